"""Direct preference optimization, and its form for labels that are sometimes wrong.

    h_p = (s_better - r_better) - (s_worse - r_worse)        of pair p; s: scores, r: those of the reference
    L   = mean over p of  -(1 - e) logsigmoid(beta h_p) - e logsigmoid(-beta h_p)

Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7; e is the label smoothing of Mitchell 2023 (cDPO). TRL calls
it `loss_type: sigmoid`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from trietune.training.objectives.answers import Answers


@dataclass(frozen=True, slots=True)
class Dpo:
    """Attributes:
    beta: how closely the model is held to the reference.
    label_smoothing: share of pairs, below a half, whose order is taken to be wrong.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    needs_reference: bool = True

    def loss(self, scores: Tensor, answers: Answers) -> Tensor:
        """Mean over the pairs: [E] -> []."""
        ratio = scores - answers.reference
        margin = self.beta * (ratio[answers.better] - ratio[answers.worse])
        smoothing = self.label_smoothing
        return (-(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)).mean()

    def rewards(self, scores: Tensor, answers: Answers) -> Tensor:
        """`beta (s - r)` of each answer: [E]."""
        return self.beta * (scores - answers.reference)

    def measure(self, scores: Tensor, answers: Answers) -> dict[str, float]:
        """Nothing beside the rewards."""
        return {}
