"""Kahneman-Tversky optimization: answers that are wanted or not, each by itself.

    t   = s - r                                                  s: scores, r: those of the reference
    z0  = max(0, mean over the rows of t of the row's prompt with another row's completion), no gradient through it
    L   = mean over the rows of   desirable_weight   (1 - sigmoid(beta (t - z0)))     of a wanted answer
                                  undesirable_weight (1 - sigmoid(beta (z0 - t)))     of an unwanted one

Source: Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8. The other completion is that of the row before, in
the order of the file, so that its score under the reference is known beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trietune.training.objectives.answers import Answers


@dataclass(frozen=True, slots=True)
class Kto:
    """Attributes:
    beta: how closely the model is held to the reference.
    desirable_weight, undesirable_weight: weights of the two kinds of rows.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    needs_reference: bool = True

    def loss(self, scores: Tensor, answers: Answers) -> Tensor:
        """Mean over the rows: [E] -> []. Answers of grade 1 are wanted, of grade -1 not; others are scored for z0."""
        ratio = scores - answers.reference
        difference = ratio - _z0(ratio, answers)
        wanted, unwanted = answers.grade > 0, answers.grade < 0
        parts = (
            self.desirable_weight * (1 - torch.sigmoid(self.beta * difference[wanted])),
            self.undesirable_weight * (1 - torch.sigmoid(-self.beta * difference[unwanted])),
        )
        return torch.cat(parts).mean()

    def rewards(self, scores: Tensor, answers: Answers) -> Tensor:
        """`beta (s - r)` of each answer: [E]."""
        return self.beta * (scores - answers.reference)

    def measure(self, scores: Tensor, answers: Answers) -> dict[str, float]:
        """`kl` is z0; rewards and log-probabilities of wanted (`chosen`) and unwanted (`rejected`) answers."""
        rewards = self.rewards(scores, answers)
        metrics = {"kl": float(_z0(scores - answers.reference, answers))}
        for name, chosen in (("chosen", answers.grade > 0), ("rejected", answers.grade < 0)):
            if chosen.any():
                metrics[f"rewards/{name}"] = float(rewards[chosen].mean())
                metrics[f"logps/{name}"] = float(scores[chosen].mean())
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics


def _z0(ratio: Tensor, answers: Answers) -> Tensor:
    return ratio[~answers.is_trained].detach().mean().clamp(min=0)
