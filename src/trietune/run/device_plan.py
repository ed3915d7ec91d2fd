"""What settings ask of a device, what a device cannot do of it, and the static shapes of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from trietune.device.memory import USABLE_SHARE
from trietune.device.options import DeviceOptions, compile_option, read_mesh
from trietune.errors import UserError
from trietune.run.plan import StaticPlan
from trietune.training.sampler import Sampler
from trietune.trie import UNBOUNDED, make_micro_batches
from trietune.trie.static_shapes import LABEL_STEP, LONG_STEP, StaticShape, StaticShapes, choose_shapes, rounded_length

if TYPE_CHECKING:
    from trietune.config.settings import Settings
    from trietune.device import Device
    from trietune.model.base.shape import NetworkShape
    from trietune.run.objective import Rows
    from trietune.trie import MicroBatch, Sequences
    from trietune.trie.groups import PrefixGroups
    from trietune.trie.static_shapes import StaticShapes

MESH_KEYS = ("mesh_shape", "tp_sharding_specs", "model_sharding_patterns", "input_sharding_dim", "parallelism_strategy")
SHARDING_DEVICES = ("cpu", "cuda")
# Batches of the first epoch that are laid out to choose shapes from, spread evenly over it.
LAID_OUT = 64
# Lengths that are tried as the largest, from above, until one fits into memory: a mask grows with its square.
LARGEST_LENGTHS = (8192, 6144, 4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256)


def device_options(settings: Settings) -> DeviceOptions:
    """The mesh and the compile options that the settings describe.

    Raises:
        UserError: a mesh that contradicts itself.
    """
    asked = [key for key in MESH_KEYS if getattr(settings, key) not in (None, "single")]
    compile_options = {name: compile_option(value) for name, value in (settings.xla_compile_options or {}).items()}
    if settings.enable_trace:
        compile_options["enable_trace"] = "true"
    return DeviceOptions(
        mesh=read_mesh(
            strategy=settings.parallelism_strategy,
            shape=settings.mesh_shape,
            axis_names=settings.mesh_axis_names,
            shardings=settings.model_sharding_patterns or settings.tp_sharding_specs,
            data_dimension=settings.input_sharding_dim,
            where=settings.where(asked[0]) if asked else "",
        ),
        compile_options=compile_options,
        trace_region_mb=settings.trace_region_size_mb,
    )


def check_device(settings: Settings, device: Device, options: DeviceOptions, say: Callable[[str], None]) -> None:
    """Refuse what `device` cannot do, by name; what only makes another device faster is said and left.

    Raises:
        UserError: for several devices where there is one, and for settings that static shapes do not allow.
    """
    if options.mesh is not None and not device.has_mesh:
        key = next(key for key in MESH_KEYS if getattr(settings, key) not in (None, "single"))
        raise UserError(
            f"`{key}` asks for several devices, and this run is on one: {device.name}",
            where=settings.where(key),
            next_step=f"`--set {key}={'single' if key == 'parallelism_strategy' else 'null'}` trains on one; "
            "a mesh needs `device: tt` or `device: xla`",
        )
    for note in device.notes:
        say(note)
    if options.compile_options and not device.has_static_shapes:
        names = ", ".join(f"`{name}`" for name in options.compile_options)
        say(f"{names}: of no effect on {device.name}, where nothing is compiled for XLA")
    if not device.has_static_shapes:
        return
    refusals = {
        "batching": (settings.batching == "padded", "plain rows have no static shape here", "batching=packed"),
        "lora_dropout": (
            settings.lora_dropout > 0,
            "each step's seed would be a number in its program, which is then compiled again at every step",
            "lora_dropout=0",
        ),
        "base_dropout": (
            settings.base_dropout,
            "each step's seed would be a number in its program, which is then compiled again at every step",
            "base_dropout=False",
        ),
    }
    for key, (is_refused, reason, remedy) in refusals.items():
        if is_refused:
            raise UserError(
                f"`{key}: {getattr(settings, key)}` does not run on {device.name}: {reason}",
                where=settings.where(key),
                next_step=f"`--set {remedy}`",
            )


def check_processes(settings: Settings, device: Device, num_processes: int, say: Callable[[str], None]) -> None:
    """Refuse what several processes cannot do, by name; say how they share where the settings name another way.

    Raises:
        UserError: several processes on a device that compiles whole steps, or with a mesh.
    """
    strategy = settings.parallelism_strategy
    if strategy == "fsdp":
        if num_processes == 1:
            raise UserError(
                "`parallelism_strategy: fsdp` shards a model over processes, and one process was started",
                where=settings.where("parallelism_strategy"),
                next_step="`--nproc N` (or torchrun) starts several; `--set parallelism_strategy=single` trains in one",
            )
        if device.kind not in SHARDING_DEVICES:
            raise UserError(
                f"`parallelism_strategy: fsdp` runs on CUDA and on the processor, and this run is on {device.name}",
                where=settings.where("parallelism_strategy"),
                next_step="`--set device=cpu`, or `--set parallelism_strategy=single` with one process",
            )
    if num_processes == 1:
        if strategy == "data_parallel" and settings.mesh_shape is None:
            say("`parallelism_strategy: data_parallel`, and one process: trained as `single`; `--nproc N` starts more")
        return
    if settings.mesh_shape is not None or strategy == "tensor_parallel":
        key = "mesh_shape" if settings.mesh_shape is not None else "parallelism_strategy"
        raise UserError(
            f"`{key}` describes devices within one process, and {num_processes} processes were started",
            where=settings.where(key),
            next_step="start one process, or leave the mesh out: `--set mesh_shape=null --set "
            "parallelism_strategy=data_parallel`",
        )
    if device.has_static_shapes:
        raise UserError(
            f"{num_processes} processes cannot share {device.name}: its programs hold whole steps",
            where=settings.where("device"),
            next_step="start one process, with `mesh_shape` for several devices, or `--set device=cpu`",
        )
    if strategy == "single":
        say(f"`parallelism_strategy: single`, and {num_processes} processes: they share each step (data parallel)")


def check_sharding(settings: Settings, shape: NetworkShape) -> None:
    """Refuse to shard what has its adapters on more than modules.

    Raises:
        UserError: adapters on stacks of matrices, as experts are.
    """
    if settings.parallelism_strategy == "fsdp" and shape.adapts_parameters:
        raise UserError(
            "`parallelism_strategy: fsdp` shards the experts that this run puts adapters on, and those read them whole",
            where=settings.where("parallelism_strategy"),
            next_step="`--set parallelism_strategy=data_parallel`, or `--set lora_target_parameters=[]`, which leaves "
            "the experts without adapters",
        )


def plan_shapes(
    settings: Settings,
    device: Device,
    sequences: Rows,
    validation: Sequences | None,
    groups: PrefixGroups | None,
    free_bytes: int,
    position_bytes: Callable[..., int],
) -> StaticPlan:
    """The shapes that pad this data little, from batches laid out as training will.

    Args:
        free_bytes: left for a micro-batch.
        position_bytes: what a position takes when it attends `scores_per_position` others.
    """
    sampler = Sampler(sequences.num_rows, batch_size=settings.batch_size, seed=settings.seed, groups=groups)
    last = sampler.batches_per_epoch - 1
    numbers = np.unique(np.linspace(0, last, min(LAID_OUT, last + 1)).astype(int)).tolist()
    batches = [sampler.batch(0, number) for number in numbers]

    def lay_out(bound: int) -> list[list[MicroBatch]]:
        return [
            [
                micro_batch
                for part in sequences.parts_of(batch)
                for micro_batch in make_micro_batches(sequences, part, batching=settings.batching, max_positions=bound)
            ]
            for batch in batches
        ]

    longest = _longest(sequences)
    deepest = max(longest, 0 if validation is None else _longest(validation)) - 1
    bound = largest_under_mask(settings, free_bytes, position_bytes)
    if device.num_rows > 1:
        # Each device gets its part of a batch.
        largest = max(sum(mb.num_positions for mb in batch) for batch in lay_out(UNBOUNDED))
        bound = min(bound, rounded_length(max(-(-largest // device.num_rows), longest)))
    sizes = [(mb.num_positions, len(mb.labels)) for batch in lay_out(bound) for mb in batch]
    shapes = choose_shapes(sizes, longest=longest, deepest=deepest, num_rows=device.num_rows)
    real = [mb for batch in lay_out(shapes.max_positions) for mb in batch]
    padded = [mb for batch in lay_out(shapes.max_positions) for mb in shapes.pad_to_shapes(batch)]
    return StaticPlan(
        shapes,
        _sum(padded, lambda mb: mb.num_positions) / _sum(real, lambda mb: mb.num_positions) - 1,
        _sum(padded, lambda mb: len(mb.labels)) / _sum(real, lambda mb: len(mb.labels)) - 1,
    )


def largest_under_mask(settings: Settings, free_bytes: int, position_bytes: Callable[..., int]) -> int:
    """Positions of the largest micro-batch that fits when all attend all, or that the settings ask for."""
    asked = settings.max_tokens_per_micro_batch
    if asked != "auto":
        return asked
    usable = USABLE_SHARE * free_bytes
    fitting = [n for n in LARGEST_LENGTHS if n * position_bytes(scores_per_position=n) <= usable]
    return max(fitting, default=LARGEST_LENGTHS[-1])


def shapes_for_any_data(max_positions: int, *, deepest: int, num_rows: int) -> StaticShapes:
    """Lengths that double up to `max_positions`, for a model whose prompts are not known in advance."""
    lengths = {max_positions}
    while (length := LONG_STEP * 2 ** (len(lengths) - 1)) < max_positions:
        lengths.add(length)
    return StaticShapes(tuple(StaticShape(length, LABEL_STEP) for length in sorted(lengths)), deepest, num_rows)


def _longest(sequences: Sequences) -> int:
    return int(np.diff(np.asarray(sequences.offsets)).max(initial=1))


def _sum(micro_batches: list[MicroBatch], count: Callable[[MicroBatch], int]) -> int:
    return sum(count(micro_batch) for micro_batch in micro_batches)
