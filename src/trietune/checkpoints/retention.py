"""Which checkpoints stay: the policy alone, without a disk, so that it can be tried on ten thousand histories.

    keep_last_n: 2, keep_best_n: 1, metric eval/loss (min), `*` damaged, `+` pinned

    step        50    100    150*   200    250+   300    350
    eval/loss   0.40  0.31   -      0.35   nan    0.33   0.36
                      best                        last   last
    removed     50                  200

NaN is never best, and a checkpoint without a value of its own is not ranked. A loss on other validation data says
nothing about which is better, so the best of each are kept. Damaged ones count for nothing and are
left for a person to look at. Whatever the limits say, the newest whole one stays when nothing else would.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

Mode = Literal["min", "max"]

STEP_NAME = re.compile(r"step-(?P<step>[0-9]{8,18})", re.ASCII)


class Limits(TypedDict):
    """The three settings of a run that the policy follows."""

    keep_last_n: int
    keep_best_n: int
    mode: Mode


@dataclass(frozen=True, slots=True)
class Ranked:
    """What the policy looks at.

    Attributes:
        value: value of `checkpoint_metric`; None where it was not measured.
        measured_on: what it was measured on. Values are compared only where this is the same.
    """

    step: int
    value: float | None
    is_whole: bool = True
    measured_on: str = ""


def step_name(step: int) -> str:
    """The folder's name, so padded that names sort as steps do."""
    return f"step-{step:08d}"


def best_first(checkpoints: Sequence[Ranked], mode: Mode, measured_on: str | None = None) -> list[Ranked]:
    """The whole ones that have a finite value, measured on the same, best first; of equals the newer.

    Args:
        measured_on: which ones; None, or nothing of that kind: those measured on what the newest was measured on.
    """
    ranked = _with_value(checkpoints)
    if not ranked:
        return []
    chosen = [item for item in ranked if item.measured_on == measured_on]
    if not chosen:
        newest = max(ranked, key=lambda item: item.step)
        chosen = [item for item in ranked if item.measured_on == newest.measured_on]
    sign = 1.0 if mode == "min" else -1.0
    return sorted(chosen, key=lambda item: (sign * (item.value or 0.0), -item.step))


def _with_value(checkpoints: Sequence[Ranked]) -> list[Ranked]:
    return [item for item in checkpoints if item.is_whole and item.value is not None and math.isfinite(item.value)]


def kept_steps(checkpoints: Sequence[Ranked], *, keep_last_n: int, keep_best_n: int, mode: Mode) -> set[int]:
    """The steps that the two limits keep, `keep_best_n` of each thing that was measured on; never empty while a whole
    checkpoint exists."""
    whole = sorted(item.step for item in checkpoints if item.is_whole)
    last = whole[max(0, len(whole) - keep_last_n) :]
    best = [
        item.step
        for measured_on in {item.measured_on for item in _with_value(checkpoints)}
        for item in best_first(checkpoints, mode, measured_on)[:keep_best_n]
    ]
    return {*last, *best} or set(whole[-1:])


def removable_steps(
    checkpoints: Sequence[Ranked], *, keep_last_n: int, keep_best_n: int, mode: Mode, pinned: Collection[int] = ()
) -> list[int]:
    """The steps to remove, oldest first: whole, kept by neither limit, and not pinned by a resume or an upload."""
    kept = kept_steps(checkpoints, keep_last_n=keep_last_n, keep_best_n=keep_best_n, mode=mode)
    return sorted(item.step for item in checkpoints if item.is_whole and item.step not in kept | set(pinned))
