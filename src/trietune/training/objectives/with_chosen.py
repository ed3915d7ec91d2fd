"""A preference objective with the loss of the best answers themselves added to it.

    L' = L + weight (-sum of s over the best answers / their labels)              s: scores

So the added part is what `sft` would learn of those answers. Source: the regularisation of Liu et al. 2024, arXiv
2405.16436 (TRL's `rpo_alpha`, LLaMA-Factory's `pref_ftx`); each tool takes another mean, this one that of `sft`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trietune.training.objectives.answers import Answers, Objective


@dataclass(frozen=True, slots=True)
class WithChosen:
    """Attributes:
    objective: what is added to.
    weight: weight of the added loss.
    """

    objective: Objective
    weight: float

    @property
    def needs_reference(self) -> bool:
        return self.objective.needs_reference

    def loss(self, scores: Tensor, answers: Answers) -> Tensor:
        """The sum of both: [E] -> []."""
        return self.objective.loss(scores, answers) + self.weight * _nll(scores, answers)

    def rewards(self, scores: Tensor, answers: Answers) -> Tensor | None:
        """Those of the objective itself."""
        return self.objective.rewards(scores, answers)

    def measure(self, scores: Tensor, answers: Answers) -> dict[str, float]:
        """What the objective itself tells, and `nll_loss`, the added loss before its weight."""
        return {**self.objective.measure(scores, answers), "nll_loss": float(_nll(scores, answers))}


def _nll(scores: Tensor, answers: Answers) -> Tensor:
    return -scores[answers.best].sum() / answers.counts[answers.best].sum()
