"""Simple preference optimization: means instead of sums, a margin instead of a reference.

    L = mean over pairs of  -logsigmoid(beta (m_better - m_worse) - gamma)            m: mean log-probability of a label

Source: Meng, Xia and Chen 2024, arXiv 2405.14734, equation 6.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from trietune.training.objectives.answers import Answers


@dataclass(frozen=True, slots=True)
class Simpo:
    """Attributes:
    beta: scale of the difference.
    gamma: by how much the better answer is to lead.
    """

    beta: float = 2.0
    gamma: float = 0.5
    needs_reference: bool = False

    def loss(self, scores: Tensor, answers: Answers) -> Tensor:
        """Mean over the pairs: [E] -> []."""
        mean = answers.mean(scores)
        return -logsigmoid(self.beta * (mean[answers.better] - mean[answers.worse]) - self.gamma).mean()

    def rewards(self, scores: Tensor, answers: Answers) -> Tensor:
        """`beta m` of each answer: [E]."""
        return self.beta * answers.mean(scores)

    def measure(self, scores: Tensor, answers: Answers) -> dict[str, float]:
        """Nothing beside the rewards."""
        return {}
