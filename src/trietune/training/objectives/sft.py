"""Supervised fine-tuning: the mean of `-log p` over all labels of the step.

    L = sum_i w_i (-log p_i) / sum_i w_i          i: (node, label) pairs; w_i: how many labels were merged into the pair

Its weights are known before any forward pass, so it needs no scores.
"""

from __future__ import annotations

from trietune.model.causal_lm import TrieModel
from trietune.training.gradients import accumulate_gradients
from trietune.training.objectives.learning import Learnt, Work


def learn_labels(model: TrieModel, work: Work) -> Learnt:
    """Add the gradients of the mean loss over all labels of the step."""
    return Learnt(accumulate_gradients(model, work.micro_batches, work.device.end_step, work.loss_scale))
