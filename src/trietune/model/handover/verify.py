"""Prove a hand-over before it is called done: what was written is read back and asked the same as base and adapter.

What counts is whether the answers agree, so figures are shares of positions at which the same token is likeliest. A
largest difference of logits would say little: bfloat16 by itself moves some logit by 2 without changing an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trietune.errors import UserError

# Of the positions, by how many more than bf16 itself a format may differ. f16 and bf16 keep three digits or more; eight
# bits a weight keep two; four bits are another model, and are held to what llama.cpp's own measurements show.
_ALLOWED = {"float32": 0.0, "f32": 0.0, "bf16": 0.02, "f16": 0.02, "q8_0": 0.04, "q4_k_m": 0.25}
# Two tokens that are equally likely up to fp32's rounding.
_TIES = 0.005


@dataclass(frozen=True, slots=True)
class Agreement:
    """How often two models agree on the likeliest next token.

    Attributes:
        same, positions: over all positions of the prompts.
        same_answers, prompts: over the last positions: the first token of each answer.
    """

    same: int
    positions: int
    same_answers: int
    prompts: int

    @property
    def share(self) -> float:
        return self.same / max(1, self.positions)

    def __str__(self) -> str:
        return (
            f"{self.share:.2%} of {self.positions:,} positions, {self.same_answers} of {self.prompts} first tokens of "
            "answers"
        )


@dataclass(frozen=True, slots=True)
class Reference:
    """Likeliest tokens of base and adapter in fp32, and how much of that bf16 keeps."""

    prompts: tuple[tuple[int, ...], ...]
    likeliest: tuple[torch.Tensor, ...]
    floor: Agreement


def make_reference(adapted: Any, prompts: Sequence[Sequence[int]]) -> Reference:
    """What base and adapter say, from a model in fp32; it is in bf16 afterwards, and no longer of use.

    Args:
        adapted: a PEFT model.
        prompts: token ids; empty ones are left out.
    """
    kept = tuple(tuple(prompt) for prompt in prompts if len(prompt) > 0)
    likeliest = likeliest_tokens(adapted, kept)
    adapted.to(torch.bfloat16)
    return Reference(kept, likeliest, agreement(likeliest, likeliest_tokens(adapted, kept)))


def likeliest_tokens(network: Any, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
    """The likeliest next token at each position of each prompt."""
    found = []
    with torch.no_grad():
        for prompt in prompts:
            logits = network(input_ids=torch.tensor([list(prompt)]), use_cache=False).logits
            found.append(logits[0].argmax(-1))
    return tuple(found)


def agreement(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Agreement:
    """How often two models agree; both answered the same prompts."""
    pairs = list(zip(one, other, strict=True))
    return Agreement(
        same=sum(int((a == b).sum()) for a, b in pairs),
        positions=sum(len(a) for a, _ in pairs),
        same_answers=sum(int(a[-1] == b[-1]) for a, b in pairs),
        prompts=len(pairs),
    )


def check_agreement(found: Agreement, reference: Reference, *, number_format: str, what: str) -> None:
    """Raise `UserError` if the export answers otherwise than its number format explains."""
    expected = 1.0 if number_format in ("float32", "f32") else reference.floor.share
    if found.share < expected - _ALLOWED[number_format] - _TIES:
        raise UserError(
            f"{what} does not answer like base and adapter: the likeliest token is the same at {found}",
            where=f"bf16 by itself keeps {reference.floor}",
            next_step="nothing was kept; please report this, with the family of the model. "
            "`--to transformers` keeps base and adapter apart",
        )


def check_tensors(written: Mapping[str, Any], meant: Mapping[str, Any], *, tolerance: float, what: str) -> None:
    """Raise `UserError` unless every tensor was written, and holds the numbers that were meant.

    Args:
        written, meant: NumPy arrays in float32, by name.
        tolerance: relative, by norm.
    """
    for name in meant.keys() | written.keys():
        if name not in written or name not in meant:
            raise _wrong(what, f"`{name}` is {'missing' if name not in written else 'too much'}")
        expected, found = meant[name], written[name]
        size = max(float(np.linalg.norm(expected)), 1e-30)
        if expected.shape != found.shape or not float(np.linalg.norm(found - expected)) <= tolerance * size:
            raise _wrong(what, f"`{name}` holds other numbers")


def _wrong(what: str, why: str) -> UserError:
    return UserError(
        f"{what} was read back and is not what was written: {why}", next_step="nothing was kept; try again"
    )
