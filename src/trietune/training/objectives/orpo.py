"""Odds-ratio preference optimization: learn the better answer, and raise its odds over those of the worse one.

    odds(m) = e^m / (1 - e^m)                                                         m: mean log-probability of a label
    L = mean over pairs of  -m_better - lambda logsigmoid(log odds(m_better) - log odds(m_worse))

Source: Hong, Lee and Thorne 2024, arXiv 2403.07691, equations 4 to 7. TRL's first term is the loss of prompt and
answer; here it is the answer's own, as everywhere in this program.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trietune.training.objectives.answers import Answers

# An answer that is certain has infinite odds. This is the least `-m` that fp32 probabilities can tell from none.
SMALLEST = 2.0**-24


@dataclass(frozen=True, slots=True)
class Orpo:
    """Attributes:
    weight: weight of the odds ratio; lambda in the paper.
    """

    weight: float = 0.1
    needs_reference: bool = False

    def loss(self, scores: Tensor, answers: Answers) -> Tensor:
        """Mean over the pairs: [E] -> []."""
        mean = answers.mean(scores)
        return (-mean[answers.better] - self.weight * logsigmoid(_log_odds_ratios(mean, answers))).mean()

    def rewards(self, scores: Tensor, answers: Answers) -> Tensor:
        """`lambda m` of each answer: [E]."""
        return self.weight * answers.mean(scores)

    def measure(self, scores: Tensor, answers: Answers) -> dict[str, float]:
        """Both terms apart: `nll_loss`, `log_odds_ratio` (its logsigmoid) and `log_odds_chosen` (the ratio itself)."""
        mean = answers.mean(scores)
        ratios = _log_odds_ratios(mean, answers)
        return {
            "nll_loss": float(-mean[answers.better].mean()),
            "log_odds_ratio": float(logsigmoid(ratios).mean()),
            "log_odds_chosen": float(ratios.mean()),
        }


def _log_odds_ratios(mean: Tensor, answers: Answers) -> Tensor:
    """Of each pair: [P]."""
    log_odds = mean - torch.log(-torch.expm1(mean.clamp(max=-SMALLEST)))
    return log_odds[answers.better] - log_odds[answers.worse]
