"""A graphics card that PyTorch drives through CUDA."""

from __future__ import annotations

import torch

from trietune.device.device import Device
from trietune.errors import UserError

CUDA = torch.device("cuda")


def has_cuda() -> bool:
    """Whether PyTorch sees a card."""
    return torch.cuda.is_available()


def describe_cuda(reason: str | None = None) -> Device:
    """The current card."""
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Device(
        kind="cuda",
        name=torch.cuda.get_device_name(),
        reason=reason,
        torch_device=CUDA,
        dtypes=(*((torch.bfloat16,) if has_bfloat16 else ()), torch.float32, torch.float16),
        attentions=("rows", "mask"),
        free_memory_bytes=lambda: int(torch.cuda.mem_get_info()[0]),
        used_memory_bytes=lambda: int(torch.cuda.max_memory_allocated()),
        fastest_dtype=lambda: torch.bfloat16 if has_bfloat16 else torch.float32,
        synchronise=torch.cuda.synchronize,
    )


def missing_cuda(where: str) -> UserError:
    """`device: cuda` without a card."""
    built = torch.version.cuda
    return UserError(
        "`device: cuda`, but PyTorch sees no CUDA device",
        where=f"{where}; torch {torch.__version__} "
        + (f"is built for CUDA {built}" if built else "is a build without CUDA"),
        next_step="`nvidia-smi` shows whether the driver sees a card; "
        + ("" if built else "install a CUDA build of torch; ")
        + "`--set device=auto` takes what is there",
    )
