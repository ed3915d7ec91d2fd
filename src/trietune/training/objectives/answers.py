"""The answers of a step as an objective sees them: numbers about each, and which are compared.

Letters: E answers, P pairs of a better and a worse one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from trietune.data.answers import AnswerSets

Pairs = Literal["all", "best"]


@dataclass(frozen=True, slots=True)
class Answers:
    """What is known of the answers beside their scores. Tensors on the CPU, fp64 or int64.

    Attributes:
        counts: [E], labels of each answer, its end token among them.
        reference: [E], their scores under the reference; zeros where there is none.
        grade: [E], a greater one is better.
        is_trained: bool [E]; False for what is only scored.
        row: [E], which row of the step each belongs to.
        num_rows: rows of the step.
        better, worse: [P], places of the two answers of each pair.
        best: places of the answers that no other one of their row surpasses.
    """

    counts: Tensor
    reference: Tensor
    grade: Tensor
    is_trained: Tensor
    row: Tensor
    num_rows: int
    better: Tensor
    worse: Tensor
    best: Tensor

    def mean(self, scores: Tensor) -> Tensor:
        """Mean log-probability of a label of each answer: [E]; 0 for an answer without any."""
        return scores / self.counts.clamp(min=1)


class Objective(Protocol):
    """A loss of scores. `scores` is fp64 [E]: each answer's label log-probabilities, summed."""

    @property
    def needs_reference(self) -> bool: ...

    def loss(self, scores: Tensor, answers: Answers) -> Tensor:
        """The loss of the step, a mean; differentiable by `scores`."""
        ...

    def rewards(self, scores: Tensor, answers: Answers) -> Tensor | None:
        """How much the objective thinks of each answer: [E]; None where it has no such notion."""
        ...

    def measure(self, scores: Tensor, answers: Answers) -> dict[str, float]:
        """Other numbers about these answers, by the names that TRL gives them."""
        ...


def answers_of(
    sets: AnswerSets, rows: np.ndarray, counts: np.ndarray, reference: np.ndarray | None, pairs: Pairs
) -> Answers:
    """The answers of some `rows`, in the order of `sets.sequences_of(rows)`.

    Args:
        counts: float64 [E], labels of each.
        reference: float64 [S], of every sequence of `sets`; None without a reference.
        pairs: pairs of a row with more than two answers: every better one with every worse one, or only the best.
    """
    sequences = sets.sequences_of(rows)
    sizes = sets.row_start[rows + 1] - sets.row_start[rows]
    starts = np.cumsum(sizes) - sizes
    grade = sets.grade[sequences]
    better, worse, best = _compare(grade, starts, sizes, pairs)
    return Answers(
        counts=torch.from_numpy(np.asarray(counts, np.float64)),
        reference=torch.from_numpy(np.zeros(len(sequences)) if reference is None else reference[sequences]),
        grade=torch.from_numpy(grade),
        is_trained=torch.from_numpy(sets.is_trained[sequences]),
        row=torch.from_numpy(np.repeat(np.arange(len(rows)), sizes)),
        num_rows=len(rows),
        better=torch.from_numpy(better),
        worse=torch.from_numpy(worse),
        best=torch.from_numpy(best),
    )


def _compare(
    grade: np.ndarray, starts: np.ndarray, sizes: np.ndarray, pairs: Pairs
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    better, worse, best = [], [], []
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        own = grade[start : start + size]
        is_best = own == own.max()
        best.append(start + np.flatnonzero(is_best))
        wins = own[:, None] > own[None, :]
        if pairs == "best":
            wins &= is_best[:, None]
        winners, losers = np.nonzero(wins)
        better.append(start + winners)
        worse.append(start + losers)
    return _joined(better), _joined(worse), _joined(best)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
