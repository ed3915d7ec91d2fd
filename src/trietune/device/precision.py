"""The number format of the base model: the one that was asked for, or the one that this device multiplies fastest."""

from __future__ import annotations

import time

import torch

from trietune.device.choose import Device
from trietune.errors import UserError

# A matrix product of about the shape of a small model's layer; two formats are told apart in some 20 ms.
PROBE_ROWS, PROBE_WIDTH = 512, 1024
# bfloat16 halves the memory, so it may be a little slower and still be the better choice.
BFLOAT16_MAY_BE_SLOWER = 1.1


def choose_dtype(dtype: str, device: Device, *, where: str) -> torch.dtype:
    """The dtype that `dtype` names; `auto` takes bfloat16 where a measured product is not slower than in float32.

    Raises:
        UserError: float16 off CUDA, bfloat16 on a card without it.
    """
    match dtype:
        case "auto":
            return torch.bfloat16 if _prefers_bfloat16(device) else torch.float32
        case "float32":
            return torch.float32
        case "bfloat16":
            if device.kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
                raise UserError(
                    f"`dtype: bfloat16`, but {device.name} does not compute in it",
                    where=where,
                    next_step="`--set dtype=float16`, or `--set dtype=auto`",
                )
            return torch.bfloat16
        case "float16":
            if device.kind != "cuda":
                raise UserError(
                    f"`dtype: float16` needs CUDA, and this run is on {device.kind}",
                    where=where,
                    next_step="`--set dtype=bfloat16`, or `--set dtype=auto` for the faster one here",
                )
            return torch.float16
        case _:
            raise ValueError(f"no dtype is called {dtype!r}")


def _prefers_bfloat16(device: Device) -> bool:
    if device.kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return product_seconds(torch.bfloat16, device) <= BFLOAT16_MAY_BE_SLOWER * product_seconds(torch.float32, device)


def product_seconds(dtype: torch.dtype, device: Device, repeats: int = 5) -> float:
    """The fastest of several products of a [512, 1024] and a [1024, 1024] matrix."""
    a = torch.ones(PROBE_ROWS, PROBE_WIDTH, dtype=dtype, device=device.torch_device)
    b = torch.ones(PROBE_WIDTH, PROBE_WIDTH, dtype=dtype, device=device.torch_device)
    best = float("inf")
    for _ in range(repeats + 1):
        device.synchronise()
        begin = time.perf_counter()
        a @ b
        device.synchronise()
        best = min(best, time.perf_counter() - begin)
    return best
