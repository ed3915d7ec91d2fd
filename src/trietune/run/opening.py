"""Device, number format, base model, tokenizer, attention: opened in one way, whoever trains, measures or asks.

open_machine      the device, checked against the settings
                  from here on transformers may be imported, which starts XLA devices
open_base         number format, folder of the base model, tokenizer
choose_attention  how tries attend, once the model's configuration is known
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from trietune.data.encoder import load_tokenizer
from trietune.device import choose_device, choose_dtype
from trietune.device.device import AttentionNeeds
from trietune.device.kernels import ANY_NUMBER_OF_POSITIONS, choose_backend
from trietune.model.base.four_bits import check_four_bits
from trietune.model.base.locate import locate_model
from trietune.run.device_plan import check_device, check_processes, device_options
from trietune.tracking.events import PhaseProgress

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

    from trietune.config.settings import Settings
    from trietune.device import Device
    from trietune.device.options import DeviceOptions
    from trietune.model.attention.layout import AttentionKind
    from trietune.model.base.folder import ModelFolder
    from trietune.tracking.tracker import Tracker


@dataclass(frozen=True, slots=True)
class Machine:
    """A device that does what the settings ask of it."""

    device: Device
    options: DeviceOptions


@dataclass(frozen=True, slots=True)
class Opened:
    """A base model and where it will run; none of its weights is loaded yet."""

    device: Device
    dtype: torch.dtype
    base: ModelFolder
    tokenizer: PreTrainedTokenizerFast


def open_machine(
    settings: Settings, tracker: Tracker, *, num_processes: int | None = None, device: Device | None = None
) -> Machine:
    """Choose the device, and refuse what it cannot do.

    Args:
        num_processes: that share a training; None trains nothing.
        device: to plan for, which need not be here; None chooses it by the settings.
    """
    if num_processes is not None:
        for note in settings.notes:
            tracker.warn(note)
    if settings.deterministic:
        make_deterministic()
    options = device_options(settings)
    if device is None:
        device = choose_device(settings.device, use_tt=settings.use_tt, options=options, where=settings.where)
    if num_processes is not None and device.reason:
        tracker.info(device.reason)
    check_device(settings, device, options, tracker.info)
    if num_processes is not None:
        check_processes(settings, device, num_processes, tracker.info)
    return Machine(device, options)


def open_base(machine: Machine, settings: Settings, name: str, tracker: Tracker, *, dtype: str | None = None) -> Opened:
    """Choose the number format, and find the base model called `name` with its tokenizer.

    Args:
        dtype: chosen by another process; None chooses it by the settings.
    """
    chosen = choose_dtype(settings.dtype if dtype is None else dtype, machine.device, where=settings.where("dtype"))
    if settings.load_in_4bit:
        check_four_bits(machine.device, where=settings.where("load_in_4bit"))
    base = locate_base(name, tracker)
    return Opened(machine.device, chosen, base, load_tokenizer(base.path))


def choose_attention(
    settings: Settings, device: Device, config: PretrainedConfig, dtype: torch.dtype
) -> tuple[AttentionKind | None, str | None]:
    """How tries attend, None for padded rows; and why not in the device's best way.

    Args:
        config: the text config of a causal model of transformers.
    """
    if settings.batching == "padded":
        return None, None
    bound = settings.max_tokens_per_micro_batch
    needs = AttentionNeeds(
        # Some models have no heads at all (Mamba, RWKV), and nothing that attends.
        head_size=getattr(config, "head_dim", None) or config.hidden_size // getattr(config, "num_attention_heads", 1),
        dtype=dtype,
        has_soft_cap=getattr(config, "attn_logit_softcapping", None) is not None,
        num_positions=ANY_NUMBER_OF_POSITIONS if bound == "auto" else bound,
    )
    kind, reason = choose_backend(settings.attention, device, needs, where=settings.where("attention"))
    return cast("AttentionKind", kind), reason


def locate_base(model_name: str, tracker: Tracker) -> ModelFolder:
    """The base model's folder; what is fetched or converted on the way is shown."""
    return locate_model(model_name, report=tracker.info, progress=progress_of(tracker, "bytes"))


def progress_of(tracker: Tracker, unit: str) -> Callable[[str, int, int | None], None]:
    """A progress callback that emits `PhaseProgress`."""

    def progress(phase: str, done: int, total: int | None) -> None:
        tracker.emit(PhaseProgress(phase, done, total, unit))

    return progress


def make_deterministic() -> None:
    """PyTorch's deterministic algorithms; cuBLAS needs its variable before the first product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
