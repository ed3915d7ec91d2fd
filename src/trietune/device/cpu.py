"""The processor: always there, the most tested path."""

from __future__ import annotations

import errno

import psutil
import torch

from trietune.device.device import Device
from trietune.device.precision import measure_fastest
from trietune.ranks.launched import processes_here

CPU = torch.device("cpu")
_resident = 0


def describe_cpu(reason: str | None = None) -> Device:
    """This machine's processor."""
    return Device(
        kind="cpu",
        name=f"CPU, {torch.get_num_threads()} threads",
        reason=reason,
        torch_device=CPU,
        dtypes=(torch.bfloat16, torch.float32),
        attentions=("rows", "mask"),
        free_memory_bytes=free_host_bytes,
        used_memory_bytes=resident_bytes,
        fastest_dtype=lambda: measure_fastest(CPU),
    )


def free_host_bytes() -> int:
    """Memory of the host that is available without swapping, an even share of it where several processes train."""
    return int(psutil.virtual_memory().available) // processes_here()


def resident_bytes() -> int:
    """Memory of the host that this process holds; what it last held while it may open no more files."""
    global _resident
    try:
        _resident = int(psutil.Process().memory_info().rss)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
    return _resident
