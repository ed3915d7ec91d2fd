"""Identity preference optimization: the margin is drawn to a fixed value, and not beyond it.

    h_p = (s_better - r_better) - (s_worse - r_worse)        of pair p; s: scores, r: those of the reference
    L   = mean over p of  (h_p - 1 / (2 beta))^2

Source: Azar et al. 2023, arXiv 2310.12036, equation 17. Scores are sums, as in the paper; TRL takes means over the
answer's tokens, so its `beta` is another one where answers differ in length.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trietune.training.objectives.answers import Answers


@dataclass(frozen=True, slots=True)
class Ipo:
    """Attributes:
    beta: how closely the model is held to the reference; the margin is drawn to `1 / (2 beta)`.
    """

    beta: float = 0.1
    needs_reference: bool = True

    def loss(self, scores: Tensor, answers: Answers) -> Tensor:
        """Mean over the pairs: [E] -> []."""
        ratio = scores - answers.reference
        margin = ratio[answers.better] - ratio[answers.worse]
        return ((margin - 1 / (2 * self.beta)) ** 2).mean()

    def rewards(self, scores: Tensor, answers: Answers) -> Tensor:
        """`beta (s - r)` of each answer: [E]."""
        return self.beta * (scores - answers.reference)

    def measure(self, scores: Tensor, answers: Answers) -> dict[str, float]:
        """Nothing beside the rewards."""
        return {}
