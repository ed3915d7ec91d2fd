"""Supervised fine-tuning: the mean of `-log p` over all labels of the step, each times its weight if it has one.

    L = sum_i w_i (-log p_i) / M         i: (node, label) pairs; w_i: the sum of the weights of the labels merged into i
                                         M: labels of the step whose weight is not 0, before merging

Without weights every label has the weight 1, so w_i counts the labels that were merged, and M is the sum of all w_i.
The weights are known before any forward pass, so scores are not needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from trietune.data.examples import IGNORED_LABEL
from trietune.model.causal_lm import TrieModel
from trietune.training.gradients import accumulate_gradients
from trietune.training.objectives.learning import Learnt, Work
from trietune.trie import MicroBatch, Sequences


def learn_labels(model: TrieModel, work: Work) -> Learnt:
    """Add the gradients of the mean loss over all labels of the step."""
    micro_batches = [*work.micro_batches, *work.fillers]
    return Learnt(accumulate_gradients(model, micro_batches, work.device.end_step, work.loss_scale, work.divisor))


@dataclass(frozen=True, slots=True)
class LearnWeightedLabels:
    """Learns labels that have weights of their own.

    Attributes:
        first: int64 [B], of each sequence, where its weights begin.
        weights: float64 [labels], of every label that is predicted by something, in the order of the data.
    """

    first: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, sequences: Sequences, weights: np.ndarray) -> LearnWeightedLabels:
        """For these sequences, with a weight at each of their tokens: float64 [tokens]."""
        is_label = np.asarray(sequences.labels) != IGNORED_LABEL
        offsets = np.asarray(sequences.offsets)
        # Nothing predicts a first token.
        is_label[offsets[:-1][offsets[:-1] < offsets[1:]]] = False
        before = np.concatenate(([0], np.cumsum(is_label)))
        return cls(before[offsets[:-1]], np.asarray(weights)[is_label])

    def __call__(self, model: TrieModel, work: Work) -> Learnt:
        """Add the gradients of the weighted sum of all labels' losses, divided by the number of labels."""
        # A filler keeps its weights of zero.
        weighted = [*map(self.weigh, work.micro_batches), *work.fillers]
        divisor = work.divisor
        if divisor is None:
            divisor = sum(len(micro_batch.pair_of_label) for micro_batch in work.micro_batches)
        loss = accumulate_gradients(model, weighted, work.device.end_step, work.loss_scale, divisor=divisor)
        return Learnt(loss)

    def weigh(self, micro_batch: MicroBatch) -> MicroBatch:
        """The micro-batch with the sum of its labels' weights at each (node, label) pair."""
        sequence = micro_batch.sequence_of_label
        # The labels of a sequence stand together, in their order.
        begins = np.flatnonzero(np.diff(sequence, prepend=-1))
        number = np.arange(len(sequence)) - np.repeat(begins, np.diff(np.append(begins, len(sequence))))
        weight = self.weights[self.first[micro_batch.sequence_indices[sequence]] + number]
        merged = np.bincount(micro_batch.pair_of_label, weights=weight, minlength=len(micro_batch.labels))
        return replace(micro_batch, label_weight=merged)
