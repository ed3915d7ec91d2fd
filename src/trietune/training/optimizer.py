"""Optimizers by the names of the field, and the learning rate as a function of the step."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from trietune.errors import UserError

Schedule = Callable[[int], float]


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer that `optim` names, over the adapter's parameters.

    `adamw` takes PyTorch's fused kernel where the device has one; `adamw_torch` does not, `adamw_torch_fused` insists.

    Raises:
        UserError: for the 8-bit ones without bitsandbytes or CUDA.
    """
    parameters = list(parameters)
    common: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    match name:
        case "adamw_torch":
            return torch.optim.AdamW(parameters, **common, foreach=True)
        case "adamw_torch_fused":
            return torch.optim.AdamW(parameters, **common, fused=True)
        case "adamw":
            fused = device.type in ("cpu", "cuda", "mps")
            return torch.optim.AdamW(parameters, **common, fused=fused, foreach=not fused)
        case "sgd":
            return torch.optim.SGD(parameters, **common)
        case "adafactor":
            return torch.optim.Adafactor(parameters, **common)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, **common)
        case "adagrad":
            return torch.optim.Adagrad(parameters, **common)
        case "adamw_8bit" | "paged_adamw_8bit":
            return _eight_bit(name, parameters, common, device)
        case _:
            raise ValueError(f"no optimizer is called {name!r}")


def _eight_bit(
    name: str, parameters: list[nn.Parameter], common: dict[str, Any], device: torch.device
) -> torch.optim.Optimizer:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"`optim: {name}` needs bitsandbytes, which is not installed",
            next_step="pip install bitsandbytes, or `--set optim=adamw`",
        )
    if device.type != "cuda":
        raise UserError(
            f"`optim: {name}` runs on CUDA, and this run is on {device.type}", next_step="`--set optim=adamw`"
        )
    import bitsandbytes

    kind = bitsandbytes.optim.PagedAdamW8bit if name.startswith("paged") else bitsandbytes.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(parameters, **common)
    return optimizer


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
