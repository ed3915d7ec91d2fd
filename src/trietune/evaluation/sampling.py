"""Draw the next token instead of taking the likeliest: temperature and nucleus (top-p) sampling.

Nucleus sampling is that of Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020: the fewest likeliest
tokens whose probabilities add up to `top_p`, drawn in proportion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trietune.errors import UserError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: logits are divided by it; above 0.
        top_p: share of the probability that tokens are drawn from; above 0, at most 1.
    """

    temperature: float
    top_p: float = 1.0

    def choose(self, logits_BV: Tensor) -> Tensor:
        """A token for each row; int64 [B]."""
        probabilities = torch.softmax(logits_BV.float() / self.temperature, dim=-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            # A token stays if those before it do not reach `top_p` yet; the first one always does.
            ordered[ordered.cumsum(dim=-1) - ordered >= self.top_p] = 0
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        drawn: Tensor = torch.multinomial(probabilities, 1)[:, 0]
        return drawn


def make_sampling(temperature: float | None, top_p: float | None) -> Sampling | None:
    """From what was asked for; None is greedy. `top_p` without a temperature draws at temperature 1.

    Raises:
        UserError: out of range.
    """
    if temperature is not None and not 0 <= temperature <= 10:
        raise UserError(
            f"a temperature of {temperature:g} is not allowed", next_step="0 takes the likeliest token; 0.7 is usual"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top-p {top_p:g} is not allowed", next_step="a number above 0, at most 1; 0.9 is usual")
    if temperature == 0 or (temperature is None and top_p is None):
        return None
    return Sampling(1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p)
