"""A GPU that PyTorch drives through CUDA."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from trietune.device.device import Device
from trietune.device.kernels import CudaDevice, unsupported_reason
from trietune.errors import UserError

CUDA = torch.device("cuda")
# Allocations, the latest ones, that are kept for a snapshot: some steps of a model of a few dozen layers.
MEMORY_EVENTS = 100_000


def has_cuda() -> bool:
    """Whether PyTorch sees a GPU."""
    return torch.cuda.is_available()


def describe_cuda(reason: str | None = None) -> Device:
    """The current GPU.

    PyTorch's attention through cuDNN is turned off for the process: under a mask its gradient of the queries is NaN on
    H100 where the length leaves 64 after division by 128 (pytorch/pytorch issue 196678).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Device(
        kind="cuda",
        name=torch.cuda.get_device_name(),
        reason=reason,
        torch_device=CUDA,
        dtypes=(*((torch.bfloat16,) if has_bfloat16 else ()), torch.float32, torch.float16),
        attentions=("varlen", "flex", "mask", "rows"),
        refuses_attention=partial(unsupported_reason, _card()),
        free_memory_bytes=lambda: int(torch.cuda.mem_get_info()[0]),
        used_memory_bytes=lambda: int(torch.cuda.max_memory_allocated()),
        fastest_dtype=lambda: torch.bfloat16 if has_bfloat16 else torch.float16,
        runs_bitsandbytes=True,
        watch_memory=_watch_memory,
        write_memory_snapshot=_write_memory_snapshot,
        synchronize=torch.cuda.synchronize,
        to_device=_place_rows,
        compilations=_num_compilations,
    )


def _card() -> CudaDevice:
    properties = torch.cuda.get_device_properties()
    return CudaDevice(
        capability=(properties.major, properties.minor),
        shared_memory_bytes=getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block),
        has_flash=torch.backends.cuda.is_flash_attention_available(),
        has_triton=find_spec("triton") is not None,
    )


def _place_rows(tensor: torch.Tensor) -> torch.Tensor:
    """To the GPU without waiting: it copies from pinned memory while the host continues."""
    return tensor.pin_memory().to(CUDA, non_blocking=True)


def _watch_memory() -> None:
    # Sizes and order alone cost nothing that can be measured; lines of code would cost 2 us per allocation.
    torch.cuda.memory._record_memory_history(context=None, max_entries=MEMORY_EVENTS)


def _write_memory_snapshot(path: Path) -> bool:
    """A file for https://pytorch.org/memory_viz; it is a pickle, which is written here and read by nothing of ours."""
    torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
    return True


def _num_compilations() -> int | None:
    """Programs that `torch.compile` has made in this process; None before the first."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"] or None


def missing_cuda(where: str) -> UserError:
    """`device: cuda` without a GPU."""
    built = torch.version.cuda
    return UserError(
        "`device: cuda`, but PyTorch sees no CUDA device",
        where=f"{where}; torch {torch.__version__} "
        + (f"is built for CUDA {built}" if built else "was built without CUDA"),
        next_step="`nvidia-smi` shows whether the driver sees a GPU; "
        + ("" if built else "install a CUDA build of torch; ")
        + "`--set device=auto` uses what is there",
    )
