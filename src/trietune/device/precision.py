"""The number format of the base model: the one that was asked for, or the one that this device multiplies fastest."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from trietune.device.device import Device
from trietune.errors import UserError

# A matrix product of about the shape of a small model's layer; two formats are told apart in some 20 ms.
PROBE_ROWS, PROBE_WIDTH = 512, 1024
# bfloat16 halves the memory, so it may be a little slower and still be the better choice.
BFLOAT16_MAY_BE_SLOWER = 1.1

PROBE_REPEATS = 5
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def choose_dtype(dtype: str, device: Device, *, where: str) -> torch.dtype:
    """The dtype that `dtype` names; `auto` takes bfloat16 where a measured product is not slower than in float32.

    Raises:
        UserError: float16 off CUDA, bfloat16 on a GPU without it.
    """
    if dtype == "auto":
        return device.fastest_dtype()
    if DTYPES[dtype] in device.dtypes:
        return DTYPES[dtype]
    if dtype == "float16":
        raise UserError(
            f"`dtype: float16` needs CUDA, and this run is on {device.kind}",
            where=where,
            next_step="`--set dtype=bfloat16`, or `--set dtype=auto` for the faster one here",
        )
    raise UserError(
        f"`dtype: {dtype}`, but {device.name} does not compute in it",
        where=where,
        next_step="`--set dtype=float16`, or `--set dtype=auto`",
    )


def measure_fastest(device: torch.device, synchronize: Callable[[], None] = lambda: None) -> torch.dtype:
    """bfloat16 where a product in it is not slower than in float32, give or take a little."""
    bfloat16 = product_seconds(torch.bfloat16, device, synchronize)
    is_fast = bfloat16 <= BFLOAT16_MAY_BE_SLOWER * product_seconds(torch.float32, device, synchronize)
    return torch.bfloat16 if is_fast else torch.float32


def product_seconds(dtype: torch.dtype, device: torch.device, synchronize: Callable[[], None]) -> float:
    """The fastest of several products of a [512, 1024] and a [1024, 1024] matrix."""
    a = torch.ones(PROBE_ROWS, PROBE_WIDTH, dtype=dtype, device=device)
    b = torch.ones(PROBE_WIDTH, PROBE_WIDTH, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(PROBE_REPEATS + 1):
        synchronize()
        begin = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - begin)
    return best
