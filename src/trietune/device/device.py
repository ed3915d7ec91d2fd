"""A device as the rest of the program sees it. Code asks for a capability, never for the kind.

Each kind has a file that makes its object (`cpu.py`, `cuda.py`, `mps.py`, `xla.py`). The defaults are those of a device
that runs each operation when it is called; a device that compiles whole steps says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trietune.io.json_types import JsonMapping

DeviceKind = Literal["cpu", "cuda", "mps", "xla", "tt"]


def _nothing() -> None:
    """There is nothing to do at this point on this device."""


def _refuses_nothing(kind: str, needs: AttentionNeeds) -> None:
    """Every way to attend takes any model."""


def _writes_nothing(path: Path) -> bool:
    """Nothing has been noted."""
    return False


def _as_it_is(value: object) -> Any:
    return value


def recompute(function: Callable[..., object], *args: object, **kwargs: Any) -> object:
    """Call `function`, keep no activations, and call it again in the backward pass; PyTorch's non-reentrant kind."""
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


@dataclass(frozen=True, slots=True)
class AttentionNeeds:
    """What a model asks of attention.

    Attributes:
        head_size: numbers of one head.
        dtype: dtype of queries, keys and values.
        has_soft_cap: whether scores are soft-capped.
        num_positions: positions in the largest micro-batch.
    """

    head_size: int
    dtype: torch.dtype
    has_soft_cap: bool
    num_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where a run computes.

    Attributes:
        kind: for records and messages; no decision is made by it outside this package.
        name: for people: `CPU, 2 threads`, `NVIDIA H100`.
        reason: one line on why this one, or None if it is what was asked for.
        torch_device: where tensors are placed.
        dtypes: dtypes that a base model may be held in.
        attentions: ways in which a trie can attend here, best first; the last takes any model.
        refuses_attention: why one of these ways does not take a model; None if it does.
        has_static_shapes: every new tensor shape costs a compilation, so batches are padded to a few shapes, and
            nothing that happens may depend on a value on the device.
        num_rows: tries that are computed side by side: devices that split a batch.
        has_mesh: whether several devices can share a run.
        notes: what a user should be told once about how the device was started.
        runs_own_backwards: whether functions with a backward of their own (`fused_layers`) pay.
        reads_every_step: whether loss and gradient norm are read after each step. Elsewhere they stay on the device
            until they are reported.
        adamw, fastest_adamw: keyword arguments of PyTorch's AdamW for `optim: adamw_torch` and `optim: adamw`.
        optimizers: names of `optim` that run here; None for all but the 8-bit ones.
        runs_bitsandbytes: whether bitsandbytes has kernels for it.
        free_memory_bytes: memory that a new process could still use without swapping.
        used_memory_bytes: memory of this process: resident on the host, or the peak of the allocator on the device.
        fastest_dtype: what `dtype: auto` takes.
        watch_memory: begin to note what allocates memory, for `write_memory_snapshot`.
        write_memory_snapshot: write what took memory until it ran out into a file; False where nothing is noted.
        synchronize: wait until what was asked of the device is done.
        end_step: what was recorded since the last call is one unit of work: begin it.
        seed: sets the seed of what is random on the device.
        learning_rate: a learning rate as an optimizer's group keeps it here.
        to_device: take a tensor to the device whose first axis is the rows of a micro-batch; where several devices
            share the rows, each gets its part.
        place_network: take a network to the device, and split its weights where several devices share them.
        recompute: run a function that is computed again in the backward pass instead of keeping its activations.
        compilations: programs compiled so far in this process.
    """

    kind: DeviceKind
    name: str
    torch_device: torch.device
    dtypes: tuple[torch.dtype, ...]
    attentions: tuple[str, ...]
    free_memory_bytes: Callable[[], int]
    used_memory_bytes: Callable[[], int]
    fastest_dtype: Callable[[], torch.dtype]
    reason: str | None = None
    refuses_attention: Callable[[str, AttentionNeeds], str | None] = _refuses_nothing
    has_static_shapes: bool = False
    num_rows: int = 1
    has_mesh: bool = False
    notes: tuple[str, ...] = ()
    runs_own_backwards: bool = True
    reads_every_step: bool = True
    adamw: JsonMapping = field(default_factory=lambda: {"foreach": True})
    fastest_adamw: JsonMapping = field(default_factory=lambda: {"fused": True})
    optimizers: tuple[str, ...] | None = None
    runs_bitsandbytes: bool = False
    watch_memory: Callable[[], None] = _nothing
    write_memory_snapshot: Callable[[Path], bool] = _writes_nothing
    synchronize: Callable[[], None] = _nothing
    end_step: Callable[[], None] = _nothing
    seed: Callable[[int], object] = torch.manual_seed
    learning_rate: Callable[[float], float | Tensor] = _as_it_is
    to_device: Callable[[Tensor], Tensor] | None = None
    place_network: Callable[[nn.Module], None] | None = None
    recompute: Callable[..., object] = recompute
    compilations: Callable[[], int | None] = lambda: None

    @property
    def loading_device(self) -> torch.device:
        """Where a network is put together before `place_network` takes it to the device."""
        return self.torch_device if self.place_network is None else torch.device("cpu")
