"""Devices behind XLA: a Tenstorrent card through its plug-in, or what else PJRT offers, its own CPU client included.

XLA records the operations of a step and compiles them as one program for each set of shapes. Two habits of the
Tenstorrent plug-in decide how a step must be written: every Python number, and every tensor of no dimension that comes
from the host, becomes a constant of the program. So a learning rate is uploaded as a tensor of one element, and
AdamW counts its steps on the device (`capturable`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trietune.device.cpu import free_host_bytes, resident_bytes
from trietune.device.device import Device
from trietune.device.options import DeviceOptions
from trietune.device.xla.mesh import Sharder
from trietune.device.xla.plugin import INSTALL_TENSTORRENT, PLUGIN_GROUP, has_plugin
from trietune.device.xla.runtime import FALLBACK_TYPE, TENSTORRENT_TYPE, start_runtime, torch_xla_version
from trietune.errors import UserError

# Bytes that Tenstorrent's runtime sets aside for recorded commands; read when it starts.
TRACE_REGION = "TT_RUNTIME_TRACE_REGION_SIZE"
# Steps are counted and learning rates applied on the device; no Python number changes from step to step.
CAPTURABLE = {"foreach": False, "capturable": True}
# `capturable` AdamW divides by the learning rate, which is 0 in the first step of a warm-up; this one moves no weight.
LEAST_LEARNING_RATE = 1e-20


def start_tenstorrent(options: DeviceOptions, where: str, reason: str | None = None) -> Device:
    """Start the Tenstorrent plug-in.

    Raises:
        UserError: it, its library or torch_xla is missing, or XLA cannot be started any more in this process.
    """
    if not has_plugin():
        raise UserError(
            "`device: tt`, but no Tenstorrent plug-in is installed",
            where=f"{where}; no entry point `tt` in the group {PLUGIN_GROUP}",
            next_step=f"{INSTALL_TENSTORRENT}; `--set device=auto` uses what is there",
        )
    return _start(TENSTORRENT_TYPE, options, where, reason)


def start_xla(options: DeviceOptions, where: str) -> Device:
    """Start what PJRT offers: the type that PJRT_DEVICE names, else a Tenstorrent plug-in, else XLA's CPU client.

    Raises:
        UserError: torch_xla is missing, or XLA cannot be started.
    """
    chosen = os.environ.get("PJRT_DEVICE") or (TENSTORRENT_TYPE if has_plugin() else FALLBACK_TYPE)
    return _start(chosen, options, where, None)


def _start(device_type: str, options: DeviceOptions, where: str, reason: str | None) -> Device:
    if options.trace_region_mb is not None:
        os.environ[TRACE_REGION] = str(options.trace_region_mb * 1_000_000)
    device = start_runtime(device_type, where, is_mesh=options.mesh is not None)
    sharder = Sharder.of(options.mesh, where) if options.mesh is not None else None
    return _describe(device_type, device, sharder, reason, _set_compile_options(options.compile_options))


def _describe(
    device_type: str, device: torch.device, sharder: Sharder | None, reason: str | None, notes: tuple[str, ...]
) -> Device:
    import torch_xla

    is_tenstorrent = device_type == TENSTORRENT_TYPE

    def learning_rate(value: float) -> torch.Tensor:
        return torch.tensor([max(value, LEAST_LEARNING_RATE)]).to(device)[0]

    def to_device(tensor: torch.Tensor) -> torch.Tensor:
        there = tensor.to(device)
        if sharder is not None:
            sharder.split_rows(there)
        return there

    def place_network(network: nn.Module) -> None:
        network.to(device)
        # Moving to XLA makes new parameters, so a head that was the embedding is a copy of it now.
        network.tie_weights()  # type: ignore[operator]  # of transformers, which is untyped
        if sharder is not None:
            sharder.split_weights(network)

    name = "Tenstorrent device through PJRT" if is_tenstorrent else f"{device_type} through PJRT"
    return Device(
        kind="tt" if is_tenstorrent else "xla",
        name=name if sharder is None else f"{name}, mesh of {sharder.description}",
        reason=reason,
        torch_device=device,
        dtypes=(torch.bfloat16, torch.float32),
        attentions=("mask",),
        free_memory_bytes=lambda: _memory(device)[0],
        used_memory_bytes=lambda: _memory(device)[1],
        fastest_dtype=lambda: torch.bfloat16 if is_tenstorrent else torch.float32,
        has_static_shapes=True,
        num_rows=1 if sharder is None else sharder.mesh.num_rows,
        has_mesh=True,
        notes=notes,
        runs_own_backwards=False,
        reads_every_step=False,
        adamw=CAPTURABLE,
        fastest_adamw=CAPTURABLE,
        optimizers=("adamw", "adamw_torch"),
        synchronize=lambda: torch_xla.sync(wait=True),
        end_step=torch_xla.sync,
        # Its generator holds 32 bits.
        seed=lambda seed: torch_xla.manual_seed(seed & 0xFFFFFFFF),
        learning_rate=learning_rate,
        to_device=to_device,
        place_network=place_network,
        recompute=_recompute,
        compilations=num_compilations,
    )


def _set_compile_options(options: Mapping[str, str]) -> tuple[str, ...]:
    """Tell the compiler; a line for the user where the installed torch_xla cannot be told."""
    if not options:
        return ()
    import torch_xla

    shown = ", ".join(f"{name}={value}" for name, value in options.items())
    if not hasattr(torch_xla, "set_custom_compile_options"):
        return (
            f"torch_xla {torch_xla_version()} takes no compile options, so {shown} has no effect: they need "
            "Tenstorrent's own build of it",
        )
    torch_xla.set_custom_compile_options(dict(options))
    return (f"compiling with {shown}",)


def _recompute(function: object, *args: object) -> object:
    """torch_xla's checkpointing; PyTorch's own looks for a `torch.xla` that does not exist.

    It is of the reentrant kind, which gives no gradient at all unless an input asks for one; behind a frozen embedding
    none does.
    """
    from torch_xla.utils.checkpoint import checkpoint

    if torch.is_grad_enabled() and not any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
        args = tuple(_asking(arg) for arg in args)
    return checkpoint(function, *args, use_reentrant=True)


def _asking(value: Any) -> object:
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
