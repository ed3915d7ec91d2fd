"""One right answer among several: cross-entropy over the candidates' scores.

    L = mean over rows of  -log softmax(z)[right]           z: scores of the row's answers, or their means over labels

It trains what `evaluate` measures of a classification task: which of its labels the model finds most likely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trietune.training.objectives.answers import Answers


@dataclass(frozen=True, slots=True)
class Rank:
    """Attributes:
    by: whether candidates compete by the sum of their log-probabilities or by the mean.
    """

    by: Literal["sum", "mean"] = "sum"
    needs_reference: bool = False

    def loss(self, scores: Tensor, answers: Answers) -> Tensor:
        """Mean over the rows: [E] -> []. `answers.best` holds the one right answer of each row."""
        values = self._values(scores, answers)
        return (_log_sum_exp(values, answers) - values[answers.best]).mean()

    def rewards(self, scores: Tensor, answers: Answers) -> None:
        """None: candidates are compared by their scores themselves."""

    def measure(self, scores: Tensor, answers: Answers) -> dict[str, float]:
        """`accuracy`: how often the right answer has the greatest value, ties not counted."""
        values = self._values(scores, answers)
        others = values.clone()
        others[answers.best] = -torch.inf
        greatest = torch.full((answers.num_rows,), -torch.inf, dtype=values.dtype)
        greatest = greatest.scatter_reduce(0, answers.row, others, "amax")
        return {"accuracy": float((values[answers.best] > greatest).double().mean())}

    def _values(self, scores: Tensor, answers: Answers) -> Tensor:
        return scores if self.by == "sum" else answers.mean(scores)


def _log_sum_exp(values: Tensor, answers: Answers) -> Tensor:
    """Over the answers of each row: [E] -> [rows]."""
    greatest = torch.full((answers.num_rows,), -torch.inf, dtype=values.dtype)
    greatest = greatest.scatter_reduce(0, answers.row, values.detach(), "amax")
    sums = torch.zeros_like(greatest).index_add(0, answers.row, torch.exp(values - greatest[answers.row]))
    return greatest + torch.log(sums)
