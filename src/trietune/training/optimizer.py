"""Optimizers by the names of the field."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from trietune.device import Device
from trietune.errors import UserError
from trietune.training.flat_adamw import FlatAdamW, can_be_flat


def build_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    device: Device,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """The optimizer that `optim` names, over the adapter's parameters; `betas` and `eps` are AdamW's.

    `adamw` takes PyTorch's fused kernel where the device has one; `adamw_torch` does not, `adamw_torch_fused` insists.

    Raises:
        UserError: for the 8-bit ones without bitsandbytes or CUDA, and for one that does not run on this device.
    """
    if device.optimizers is not None and name not in device.optimizers:
        raise UserError(
            f"`optim: {name}` does not run on {device.name}: it reads numbers back at each step",
            next_step=" or ".join(f"`--set optim={other}`" for other in device.optimizers),
        )
    parameters = list(parameters)
    common: dict[str, Any] = {"lr": device.learning_rate(learning_rate), "weight_decay": weight_decay}
    adamw = {**common, "betas": betas, "eps": eps}
    match name:
        case "adamw_torch":
            return _adamw(parameters, device, {**adamw, **device.adamw})
        case "adamw_torch_fused":
            return _adamw(parameters, device, {**adamw, "fused": True})
        case "adamw":
            return _adamw(parameters, device, {**adamw, **device.fastest_adamw})
        case "sgd":
            return torch.optim.SGD(parameters, **common)
        case "adafactor":
            return torch.optim.Adafactor(parameters, **common)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, **common)
        case "adagrad":
            return torch.optim.Adagrad(parameters, **common)
        case "adamw_8bit" | "paged_adamw_8bit":
            return _eight_bit(name, parameters, adamw, device)
        case _:
            raise ValueError(f"no optimizer is called {name!r}")


def _adamw(parameters: list[nn.Parameter], device: Device, options: dict[str, Any]) -> torch.optim.AdamW:
    # Where steps are programs, a parameter that is a view of another is one more thing to trace.
    if device.has_static_shapes or not can_be_flat(parameters):
        return torch.optim.AdamW(parameters, **options)
    return FlatAdamW(parameters, **options)


def _eight_bit(
    name: str, parameters: list[nn.Parameter], common: dict[str, Any], device: Device
) -> torch.optim.Optimizer:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"`optim: {name}` needs bitsandbytes, which is not installed",
            next_step="pip install bitsandbytes, or `--set optim=adamw`",
        )
    if not device.runs_bitsandbytes:
        raise UserError(
            f"`optim: {name}` runs on CUDA, and this run is on {device.kind}", next_step="`--set optim=adamw`"
        )
    import bitsandbytes

    kind = bitsandbytes.optim.PagedAdamW8bit if name.startswith("paged") else bitsandbytes.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(parameters, **common)
    return optimizer


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter of an AdamW a gradient, and moments and a step count unless it has them, all zero.

    Made within the first step, they would make its program another one than that of all later steps.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
