"""The learning rate as a function of the step: warm-up, then constant or falling."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def learning_rate_schedule(kind: str, *, peak: float, num_steps: int, num_warmup_steps: int) -> Schedule:
    """The learning rate of each step, counted from 0; formulas as in transformers' `get_scheduler`.

    `constant`, `linear` and `cosine` all rise in a line over `num_warmup_steps` first.
    """

    def at(step: int) -> float:
        if step < num_warmup_steps:
            return peak * step / max(1, num_warmup_steps)
        done = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
        match kind:
            case "constant":
                return peak
            case "linear":
                return peak * max(0.0, 1 - done)
            case "cosine":
                return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * done)))
            case _:
                raise ValueError(f"no schedule is called {kind!r}")

    return at
