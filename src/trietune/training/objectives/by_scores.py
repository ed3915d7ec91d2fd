"""Learn by any loss of the answers' scores, whatever micro-batches they lie in.

    pass 1     every micro-batch, no graph       s_e = sum of the log-probabilities of the labels of answer e
    between    L(s_1, ..., s_E)                  g_e = dL / ds_e, in fp64
    pass 2     every micro-batch, with a graph   sum over pairs i of w_i (-log p_i),  w_i = -sum of g_e over the labels
                                                                                            of answers e merged into i

The chain rule makes the gradients of pass 2 those of L: a parameter acts on L only through the scores, and a score is
a sum of log-probabilities. Weights have either sign. Where one micro-batch holds all that is learned from, its only
forward keeps its graph until the weights are known, and pass 1 is not needed. Labels whose weight is exactly zero,
such as the common beginning of the two answers of a pair, get no logits in pass 2.

Where several processes share a step, each computes some of its answers. Scores are added up after pass 1, a process
having zeros for the answers of others, so that all see L and g of the whole step; it does not matter whether answers
that are compared are computed by the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from trietune.data.answers import AnswerSets
from trietune.model.causal_lm import TrieModel
from trietune.training.gradients import MicroBatchTooLargeError, TooLargeElsewhereError, if_memory_suffices
from trietune.training.loss_scale import LossScale
from trietune.training.objectives.answers import Answers, Objective, Pairs, answers_of
from trietune.training.objectives.learning import Learnt, Work
from trietune.trie import MicroBatch


@dataclass(frozen=True, slots=True)
class LearnByScores:
    """Learns from steps whose rows are those of `sets`.

    Attributes:
        reference: float64 [S], scores under the reference of every sequence; None if the objective needs none.
        pairs: see `answers_of`.
        keeps_draws: whether anything is drawn in a forward (dropout). Pass 2 must then draw as pass 1 did, and so
            compute the same positions.
    """

    objective: Objective
    sets: AnswerSets
    reference: np.ndarray | None = None
    pairs: Pairs = "all"
    keeps_draws: bool = False

    def __call__(self, model: TrieModel, work: Work) -> Learnt:
        """Add the gradients of the objective's loss over all rows of the step."""
        tally = _Tally.of(self.sets, work.rows)
        learnt_from: list[MicroBatch] = []
        only_scored: list[MicroBatch] = []
        for micro_batch in work.micro_batches:
            is_trained = self.sets.is_trained[micro_batch.sequence_indices].any()
            (learnt_from if is_trained else only_scored).append(micro_batch)
        # A device that runs whole steps as programs would have to end one between a forward and its backward pass, and
        # where processes hold parts of one model, all must go forward and backward at the same time.
        is_one_pass = len(learnt_from) == 1 and not work.device.has_static_shapes and not work.ranks.has_equal_passes
        first_pass = partial(self._score, model, work, tally, learnt_from, only_scored, is_one_pass=is_one_pass)
        losses = _add_up_scores(work, tally, first_pass)
        answers = answers_of(self.sets, work.rows, tally.counts, self.reference, self.pairs)
        loss, by_score = _differentiate(self.objective, tally.scores, answers)
        if losses is not None:
            weight = tally.pair_weights(learnt_from[0], by_score)
            _run_backward(model, learnt_from[0], losses, weight, work.loss_scale)
        else:
            work.reseed()
            for number, (micro_batch, weight) in enumerate(self._weighted(learnt_from, tally, by_score, work)):
                if number:
                    work.device.end_step()
                _forward_and_backward(model, micro_batch, weight, work.loss_scale)
        scores = torch.from_numpy(tally.scores)
        # The losses of all processes are added up, and each has computed that of the whole step.
        own_loss = work.ranks.first_of(lambda: loss, lambda: 0.0)
        return Learnt(torch.tensor(own_loss, dtype=torch.float64), describe(self.objective, scores, answers))

    def _score(
        self,
        model: TrieModel,
        work: Work,
        tally: _Tally,
        learnt_from: Sequence[MicroBatch],
        only_scored: Sequence[MicroBatch],
        *,
        is_one_pass: bool,
    ) -> Tensor | None:
        """Pass 1: the scores of what is computed here; where it is the only pass, its losses with their graph."""
        losses = None
        if is_one_pass:
            losses = if_memory_suffices(lambda: model.label_losses(learnt_from[0]), learnt_from[0])
            tally.add(learnt_from[0], losses)
        own = [*only_scored] if is_one_pass else [*learnt_from, *only_scored]
        for number, micro_batch in enumerate(work.ranks.level(own, work.filler)):
            found = _forward_only(model, micro_batch)
            if number < len(own):
                tally.add(micro_batch, found)
            work.device.end_step()
        return losses

    def _weighted(
        self, micro_batches: Sequence[MicroBatch], tally: _Tally, by_score: np.ndarray, work: Work
    ) -> list[tuple[MicroBatch, np.ndarray]]:
        weighted = [(one, tally.pair_weights(one, by_score)) for one in micro_batches]
        if work.ranks.has_equal_passes:
            filler = None if work.filler is None else (work.filler, np.zeros(len(work.filler.labels)))
            return [*work.ranks.level(weighted, filler)]
        if self.keeps_draws or work.device.has_static_shapes:
            return weighted
        some = [(one, weight) for one, weight in weighted if weight.any()]
        # With nothing to learn at all, gradients of zero must still be there for the optimizer.
        return [_without_zeros(*pair) for pair in some] or weighted[:1]


def _add_up_scores(work: Work, tally: _Tally, score: Callable[[], Tensor | None]) -> Tensor | None:
    """Score what is computed here, and complete `tally` with what other processes have scored.

    Raises:
        MicroBatchTooLargeError: memory ran out here.
        TooLargeElsewhereError: it ran out in another process.
    """
    if work.ranks.count == 1 or work.ranks.has_equal_passes:
        # With equal passes the others are within a layer; the error ends them all.
        losses = score()
        too_large = None
    else:
        losses, too_large = _unless_too_large(score)
    if work.ranks.count == 1:
        return losses
    num = len(tally.scores)
    summed = work.ranks.add_arrays(np.concatenate((tally.scores, tally.counts, [float(too_large is not None)])))
    if too_large is not None:
        raise MicroBatchTooLargeError(*too_large)
    if summed[-1]:
        raise TooLargeElsewhereError
    tally.scores[:], tally.counts[:] = summed[:num], summed[num : 2 * num]
    return losses


def _unless_too_large(score: Callable[[], Tensor | None]) -> tuple[Tensor | None, tuple[int, int] | None]:
    """What `score` gives; or the size of the micro-batch that did not fit, without the error, which holds memory."""
    try:
        return score(), None
    except MicroBatchTooLargeError as error:
        return None, (error.num_positions, error.longest)


@dataclass(frozen=True, slots=True)
class _Tally:
    """Scores and labels of the step's answers as they come in; float64 [E] each.

    Attributes:
        place: int64 [S], where each sequence of the data stands among the answers.
    """

    place: np.ndarray
    scores: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, sets: AnswerSets, rows: np.ndarray) -> _Tally:
        sequences = sets.sequences_of(rows)
        place = np.zeros(len(sets), np.int64)
        place[sequences] = np.arange(len(sequences))
        return cls(place, np.zeros(len(sequences)), np.zeros(len(sequences)))

    def add(self, micro_batch: MicroBatch, losses: Tensor) -> None:
        """Take in the loss of each (node, label) pair of a micro-batch: [N]."""
        of_pair = losses.detach().cpu().double().numpy()
        place, num = self._place_of_label(micro_batch), len(self.scores)
        self.scores[:] -= np.bincount(place, weights=of_pair[micro_batch.pair_of_label], minlength=num)
        self.counts[:] += np.bincount(place, minlength=num)

    def pair_weights(self, micro_batch: MicroBatch, by_score: np.ndarray) -> np.ndarray:
        """The weight of each pair's loss: minus the sum of dL/ds over its answers; float64 [N]."""
        of_label = -by_score[self._place_of_label(micro_batch)]
        return np.bincount(micro_batch.pair_of_label, weights=of_label, minlength=len(micro_batch.labels))

    def _place_of_label(self, micro_batch: MicroBatch) -> np.ndarray:
        place: np.ndarray = self.place[micro_batch.sequence_indices[micro_batch.sequence_of_label]]
        return place


def describe(objective: Objective, scores: Tensor, answers: Answers) -> dict[str, float]:
    """What TRL tells of a batch: rewards, their margins, how often the better answer has the greater one, and more."""
    metrics: dict[str, float] = {}
    rewards = objective.rewards(scores, answers)
    better, worse = answers.better, answers.worse
    if len(better):
        if rewards is not None:
            margins = rewards[better] - rewards[worse]
            metrics["rewards/chosen"] = float(rewards[better].mean())
            metrics["rewards/rejected"] = float(rewards[worse].mean())
            metrics["rewards/accuracies"] = float((margins > 0).double().mean())
            metrics["rewards/margins"] = float(margins.mean())
        metrics["logps/chosen"] = float(scores[better].mean())
        metrics["logps/rejected"] = float(scores[worse].mean())
    return {**metrics, **objective.measure(scores, answers)}


def _differentiate(objective: Objective, scores: np.ndarray, answers: Answers) -> tuple[float, np.ndarray]:
    """The loss and dL/ds, fp64 [E]."""
    with torch.enable_grad():
        variable = torch.from_numpy(scores.copy()).requires_grad_()
        loss = objective.loss(variable, answers)
        (by_score,) = torch.autograd.grad(loss, variable)
    return loss.item(), by_score.numpy()


def _forward_only(model: TrieModel, micro_batch: MicroBatch) -> Tensor:
    with torch.no_grad():
        return if_memory_suffices(lambda: model.label_losses(micro_batch), micro_batch)


def _forward_and_backward(
    model: TrieModel, micro_batch: MicroBatch, weight: np.ndarray, loss_scale: LossScale | None
) -> None:
    losses = if_memory_suffices(lambda: model.label_losses(micro_batch), micro_batch)
    _run_backward(model, micro_batch, losses, weight, loss_scale)


def _run_backward(
    model: TrieModel, micro_batch: MicroBatch, losses: Tensor, weight: np.ndarray, loss_scale: LossScale | None
) -> None:
    def backward() -> None:
        part = torch.dot(losses, model.to_device(torch.from_numpy(weight).to(losses.dtype)))
        scaled = part if loss_scale is None else loss_scale.multiply(part)
        scaled.backward()  # type: ignore[no-untyped-call]

    if_memory_suffices(backward, micro_batch)


def _without_zeros(micro_batch: MicroBatch, weight: np.ndarray) -> tuple[MicroBatch, np.ndarray]:
    """The micro-batch without the labels that nothing is learned from; its positions stay."""
    is_kept = weight != 0
    if is_kept.all():
        return micro_batch, weight
    kept = replace(
        micro_batch,
        label_index=micro_batch.label_index[is_kept],
        labels=micro_batch.labels[is_kept],
        label_weight=micro_batch.label_weight[is_kept],
        pair_of_label=np.zeros(0, np.int32),
        sequence_of_label=np.zeros(0, np.int32),
    )
    return kept, weight[is_kept]
