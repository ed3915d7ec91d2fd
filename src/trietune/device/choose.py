"""Which device trains, and why: one object a device, so that nobody else asks what kind it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import psutil
import torch

from trietune.errors import UserError

DeviceKind = Literal["cpu", "cuda", "mps"]

# Entry point group in which a Tenstorrent plug-in registers; looked up without importing anything.
PLUGIN_GROUP = "torch_xla.plugins"


@dataclass(frozen=True, slots=True)
class Device:
    """Where a run computes.

    Attributes:
        kind: of device.
        name: for people: `AMD EPYC, 2 threads`, `NVIDIA H100`.
        reason: one line on why this one, or None if it is what was asked for.
    """

    kind: DeviceKind
    name: str
    reason: str | None = None

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.kind)

    def free_memory_bytes(self) -> int:
        """Memory that a new process could still use without swapping."""
        if self.kind == "cuda":
            return int(torch.cuda.mem_get_info()[0])
        return int(psutil.virtual_memory().available)

    def used_memory_bytes(self) -> int:
        """Memory of this process: resident on the host, or the peak of the allocator on the device."""
        if self.kind == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return int(psutil.Process().memory_info().rss)

    def synchronise(self) -> None:
        """Wait until what was asked of the device is done."""
        if self.kind == "cuda":
            torch.cuda.synchronize()
        elif self.kind == "mps":
            torch.mps.synchronize()


def choose_device(device: str, *, use_tt: bool, where: Callable[[str], str] = lambda key: key) -> Device:
    """The device that `device` and `use_tt` mean on this machine.

    Args:
        device: `auto`, `cpu`, `cuda` or `mps`; anything but `auto` insists.
        use_tt: with `auto`, a Tenstorrent device comes first, then CUDA, then the CPU.
        where: tells where a key was set, for messages.

    Raises:
        UserError: the device that was asked for by name is not here.
    """
    if device == "auto":
        reason = None
        if use_tt:
            reason = f"`use_tt: True`, but no Tenstorrent plug-in is installed: training on {_best_kind().upper()}"
            if has_plugin():
                reason = (
                    "`use_tt: True` and a Tenstorrent plug-in is installed, but this build cannot drive it yet: "
                    f"training on {_best_kind().upper()}"
                )
        return _describe(_best_kind(), reason)
    if device == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        raise UserError(
            "`device: cuda`, but PyTorch sees no CUDA device",
            where=f"{where('device')}; torch {torch.__version__} "
            + (f"is built for CUDA {built}" if built else "is a build without CUDA"),
            next_step="`nvidia-smi` shows whether the driver sees a card; "
            + ("" if built else "install a CUDA build of torch; ")
            + "`--set device=auto` takes what is there",
        )
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            "`device: mps`, but this is no Mac with a Metal device",
            where=where("device"),
            next_step="`--set device=auto` takes what is there",
        )
    if device not in ("cpu", "cuda", "mps"):
        raise UserError(
            f"`device: {device}` is not in this build", where=where("device"), next_step="`--set device=auto`"
        )
    return _describe(device, None)  # type: ignore[arg-type]  # narrowed by the line above


def has_plugin() -> bool:
    """Whether a Tenstorrent plug-in for PyTorch is installed."""
    return any(entry.name.lower() == "tt" for entry in metadata.entry_points(group=PLUGIN_GROUP))


def _best_kind() -> DeviceKind:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _describe(kind: DeviceKind, reason: str | None) -> Device:
    match kind:
        case "cuda":
            name = torch.cuda.get_device_name()
        case "mps":
            name = "Apple Metal"
        case "cpu":
            name = f"CPU, {torch.get_num_threads()} threads"
    return Device(kind, name, reason)
