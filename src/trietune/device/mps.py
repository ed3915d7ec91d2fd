"""Apple's graphics processors, through Metal."""

from __future__ import annotations

import torch

from trietune.device.cpu import free_host_bytes, resident_bytes
from trietune.device.device import Device
from trietune.device.precision import measure_fastest
from trietune.errors import UserError

MPS = torch.device("mps")


def has_mps() -> bool:
    """Whether this is a Mac with a Metal device."""
    return torch.backends.mps.is_available()


def describe_mps(reason: str | None = None) -> Device:
    """The one Metal device; its memory is the host's."""
    return Device(
        kind="mps",
        name="Apple Metal",
        reason=reason,
        torch_device=MPS,
        dtypes=(torch.bfloat16, torch.float32),
        attentions=("rows", "mask"),
        free_memory_bytes=free_host_bytes,
        used_memory_bytes=resident_bytes,
        fastest_dtype=lambda: measure_fastest(MPS, torch.mps.synchronize),
        synchronize=torch.mps.synchronize,
    )


def missing_mps(where: str) -> UserError:
    """`device: mps` elsewhere."""
    return UserError(
        "`device: mps`, but this is not a Mac with a Metal device",
        where=where,
        next_step="`--set device=auto` uses what is there",
    )
