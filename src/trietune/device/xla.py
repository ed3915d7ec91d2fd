"""Devices behind XLA: a Tenstorrent card through its plug-in, or what else PJRT offers, its own CPU client included.

XLA records the operations of a step and compiles them as one program for each set of shapes. Two habits of the
Tenstorrent plug-in decide how a step must be written: every Python number, and every tensor of no dimension that comes
from the host, becomes a constant of the program. So a learning rate is uploaded as a tensor of one element, and
AdamW counts its steps on the device (`capturable`).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from functools import cache
from typing import Any

import torch
from torch import nn

from trietune.device.cpu import free_host_bytes, resident_bytes
from trietune.device.device import Device
from trietune.device.plugin import INSTALL_TENSTORRENT, PLUGIN_GROUP, has_plugin
from trietune.errors import UserError

TENSTORRENT_TYPE = "TT"
# What answers when nobody chose: torch_xla's own client for the host's processor.
FALLBACK_TYPE = "CPU"
# Steps are counted and learning rates applied on the device; no Python number changes from step to step.
CAPTURABLE = {"foreach": False, "capturable": True}
ON_ANOTHER_DEVICE = "`--set device=cpu`, which trains without XLA"


def start_tenstorrent(where: str, reason: str | None = None) -> Device:
    """Start the Tenstorrent plug-in.

    Raises:
        UserError: it, its library or torch_xla is missing, or XLA cannot be started any more in this process.
    """
    if not has_plugin():
        raise UserError(
            "`device: tt`, but no Tenstorrent plug-in is installed",
            where=f"{where}; no entry point `tt` in the group {PLUGIN_GROUP}",
            next_step=f"{INSTALL_TENSTORRENT}; `--set device=auto` takes what is there",
        )
    device = _start(TENSTORRENT_TYPE, where)
    return _describe("tt", f"Tenstorrent device through PJRT ({device})", device, reason)


def start_xla(where: str) -> Device:
    """Start what PJRT offers: the type that PJRT_DEVICE names, else a Tenstorrent plug-in, else XLA's CPU client.

    Raises:
        UserError: torch_xla is missing, or XLA cannot be started.
    """
    chosen = os.environ.get("PJRT_DEVICE") or (TENSTORRENT_TYPE if has_plugin() else FALLBACK_TYPE)
    device = _start(chosen, where)
    kind = "tt" if chosen == TENSTORRENT_TYPE else "xla"
    return _describe(kind, f"{chosen} through PJRT ({device})", device, None)


def _describe(kind: Any, name: str, device: torch.device, reason: str | None) -> Device:
    import torch_xla

    def learning_rate(value: float) -> torch.Tensor:
        return torch.tensor([value]).to(device)[0]

    def place_network(network: nn.Module) -> None:
        network.to(device)
        # Moving to XLA makes new parameters, so a head that was the embedding is a copy of it now.
        network.tie_weights()  # type: ignore[operator]  # of transformers, which is untyped

    return Device(
        kind=kind,
        name=name,
        reason=reason,
        torch_device=device,
        dtypes=(torch.bfloat16, torch.float32),
        attentions=("mask",),
        free_memory_bytes=lambda: _memory(device)[0],
        used_memory_bytes=lambda: _memory(device)[1],
        fastest_dtype=lambda: torch.bfloat16 if kind == "tt" else torch.float32,
        has_static_shapes=True,
        runs_own_backwards=False,
        reads_every_step=False,
        adamw=CAPTURABLE,
        fastest_adamw=CAPTURABLE,
        optimizers=("adamw", "adamw_torch"),
        synchronise=lambda: torch_xla.sync(wait=True),
        end_step=torch_xla.sync,
        seed=lambda seed: torch_xla.manual_seed(seed & 0xFFFFFFFF),
        learning_rate=learning_rate,
        place_network=place_network,
        recompute=_recompute,
        compilations=num_compilations,
    )


def _recompute(function: Any, *args: Any) -> Any:
    """torch_xla's checkpointing; PyTorch's own looks for a `torch.xla` that does not exist.

    It is of the reentrant kind, which gives no gradient at all unless an input asks for one; behind a frozen embedding
    none does.
    """
    from torch_xla.utils.checkpoint import checkpoint

    if torch.is_grad_enabled() and not any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
        args = tuple(_asking(arg) for arg in args)
    return checkpoint(function, *args, use_reentrant=True)


def _asking(value: Any) -> Any:
    is_real = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if is_real else value


def num_compilations() -> int:
    """Programs that XLA has compiled so far in this process."""
    from torch_xla.debug import metrics

    data = metrics.metric_data("CompileTime")
    return int(data[0]) if data else 0


def _memory(device: torch.device) -> tuple[int, int]:
    """Free and used bytes of the device, or of the host where the device does not tell (XLA's CPU client)."""
    from torch_xla.core import xla_model

    try:
        info = xla_model.get_memory_info(device)
    except RuntimeError:
        return free_host_bytes(), resident_bytes()
    if not info.get("bytes_limit"):
        return free_host_bytes(), resident_bytes()
    used = int(info["bytes_used"])
    return int(info["bytes_limit"]) - used, int(info.get("peak_bytes_used", used))


# Starting


@cache
def _start(device_type: str, where: str) -> torch.device:
    if importlib.util.find_spec("torch_xla") is None:
        raise UserError(
            "XLA devices need torch_xla, which is not installed",
            where=f"{where}; torch {torch.__version__}",
            next_step=f"{_install_command(device_type)}; or {ON_ANOTHER_DEVICE}",
        )
    # transformers and peft start whatever they find when they are imported, unless this says what it shall be.
    before = os.environ.get("PJRT_DEVICE")
    os.environ.setdefault("PJRT_DEVICE", device_type)
    try:
        torch_xla = importlib.import_module("torch_xla")
        runtime = importlib.import_module("torch_xla.runtime")
    except Exception as error:  # a build for another torch, a plug-in whose code fails: torch_xla imports all of them
        if before is None:
            os.environ.pop("PJRT_DEVICE", None)
        raise UserError(
            f"torch_xla is installed, but it cannot be imported: {_first_line(error)}",
            where=f"{where}; torch {torch.__version__}, torch_xla {_version()}",
            next_step=f"install the two together: {_install_command(device_type)}; or {ON_ANOTHER_DEVICE}",
        ) from error
    logging.getLogger("torch_xla").setLevel(logging.ERROR)
    try:
        runtime.set_device_type(device_type)
        device: torch.device = torch_xla.device()
        _check_backward(device)
    except RuntimeError as error:
        raise _explain(error, device_type, where) from error
    return device


def _check_backward(device: torch.device) -> None:
    """A backward on the host before XLA starts breaks every backward on the device of this process, so try one."""
    torch.ones(1, device=device, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]


def _explain(error: RuntimeError, device_type: str, where: str) -> UserError:
    text = str(error)
    if "device_ready_queues_" in text or "after XLA runtime is initialized" in text:
        return UserError(
            f"XLA cannot be started for {device_type} any more: this process has already computed on another device",
            where=f"{where}; {_first_line(error)}",
            next_step="train in a new process, in which the first device is this one",
        )
    if "No PjRtPlugin registered" in text:
        return UserError(
            f"PJRT has no plug-in for the device type {device_type}",
            where=f"{where}; {_first_line(error)}",
            next_step=INSTALL_TENSTORRENT
            if device_type == TENSTORRENT_TYPE
            else f"PJRT_DEVICE={FALLBACK_TYPE}, or the plug-in of that device; or {ON_ANOTHER_DEVICE}",
        )
    if "Failed to open" in text or "cannot open shared object" in text:
        return UserError(
            f"the plug-in for {device_type} is installed, but its library cannot be opened",
            where=f"{where}; {_first_line(error)}",
            next_step=f"install the plug-in again, and the driver of the card; or {ON_ANOTHER_DEVICE}",
        )
    return UserError(
        f"the device {device_type} could not be started: {_first_line(error)}",
        where=f"{where}; torch {torch.__version__}, torch_xla {_version()}",
        next_step=ON_ANOTHER_DEVICE,
    )


def _install_command(device_type: str) -> str:
    if device_type == TENSTORRENT_TYPE:
        return INSTALL_TENSTORRENT
    return "pip install torch==2.9.0 torch_xla==2.9.0, in an environment of its own"


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("torch_xla")
    except metadata.PackageNotFoundError:
        return "of an unknown version"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
