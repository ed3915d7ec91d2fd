"""Start torch_xla's runtime, once a process, and say in words why it did not.

A runtime that failed to start stays failed for the rest of the process: whatever is asked for next, the same error
comes back. So what can be found out before is found out before, and there is no second attempt with another device.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from importlib import metadata

import torch

from trietune.device.xla.plugin import INSTALL_TENSTORRENT
from trietune.errors import UserError
from trietune.io.causes import first_line

TENSTORRENT_TYPE = "TT"
# What answers when no device is chosen: torch_xla's own client for the host's processor.
FALLBACK_TYPE = "CPU"
WITHOUT_XLA = "`--set device=cpu` trains without XLA"
INSTALL_TORCH_XLA = "pip install torch==2.9.0 torch_xla==2.9.0, in an environment of its own"


def start_runtime(device_type: str, where: str, *, is_mesh: bool) -> torch.device:
    """The device that PJRT gives for `device_type`, proven to compute a backward pass.

    Args:
        is_mesh: several devices act as one, which must be said before any tensor is on them.

    Raises:
        UserError: torch_xla is missing or cannot be imported; the plug-in or its library is missing; the process has
            computed on another device before.
    """
    if importlib.util.find_spec("torch_xla") is None:
        raise UserError(
            f"the device {device_type} needs torch_xla, which is not installed",
            where=f"{where}; torch {torch.__version__}",
            next_step=f"{_installation(device_type)}; or {WITHOUT_XLA}",
        )
    before = os.environ.get("PJRT_DEVICE")
    # transformers and peft start whatever they find when they are imported, unless this says what it shall be.
    os.environ.setdefault("PJRT_DEVICE", device_type)
    try:
        torch_xla = importlib.import_module("torch_xla")
        runtime = importlib.import_module("torch_xla.runtime")
    except (
        Exception
    ) as error:  # a build for another torch; a plug-in whose own code fails, for all are imported with it
        if before is None:
            del os.environ["PJRT_DEVICE"]
        raise UserError(
            f"torch_xla is installed, but it cannot be imported: {first_line(error)}",
            where=f"{where}; torch {torch.__version__}, torch_xla {torch_xla_version()}",
            next_step=f"install builds that belong together: {_installation(device_type)}; or {WITHOUT_XLA}",
        ) from error
    logging.getLogger("torch_xla").setLevel(logging.ERROR)
    try:
        runtime.set_device_type(device_type)
        if is_mesh:
            runtime.use_spmd()
        device: torch.device = torch_xla.device()
        runtime.global_runtime_device_count()  # a mesh's device is a name until the real ones are asked for
        # A backward on the host before XLA starts breaks every backward on the device: autograd counts devices once.
        torch.ones(1, device=device, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise _explained(error, device_type, where) from error
    return device


def torch_xla_version() -> str | None:
    """Of the installed package; None without it."""
    try:
        return metadata.version("torch_xla")
    except metadata.PackageNotFoundError:
        return None


def _explained(error: RuntimeError, device_type: str, where: str) -> UserError:
    text, line = str(error), first_line(error)
    if "device_ready_queues_" in text or "after XLA runtime is initialized" in text or "use_spmd" in text:
        return UserError(
            f"the device {device_type} can no longer be started: this process has already computed on another device",
            where=where,
            next_step="start a new process and use this device in it first",
        )
    if "No PjRtPlugin registered" in text:
        is_tenstorrent = device_type == TENSTORRENT_TYPE
        return UserError(
            f"no PJRT plug-in is registered for the device type {device_type}",
            where=where,
            next_step=INSTALL_TENSTORRENT
            if is_tenstorrent
            else f"set PJRT_DEVICE={FALLBACK_TYPE}, or install the plug-in of that device; or {WITHOUT_XLA}",
        )
    if "Failed to open" in text or "cannot open shared object" in text:
        return UserError(
            f"the plug-in for {device_type} is installed, but its library cannot be opened",
            where=f"{where}; {line}",
            next_step=f"reinstall the plug-in and the card's driver; or {WITHOUT_XLA}",
        )
    return UserError(
        f"the device {device_type} could not be started: {line}",
        where=f"{where}; torch {torch.__version__}, torch_xla {torch_xla_version()}",
        next_step=WITHOUT_XLA,
    )


def _installation(device_type: str) -> str:
    return INSTALL_TENSTORRENT if device_type == TENSTORRENT_TYPE else INSTALL_TORCH_XLA
