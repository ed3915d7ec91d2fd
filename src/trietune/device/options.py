"""What settings ask of a device beyond its kind: a mesh of several, and how it compiles."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trietune.errors import UserError
from trietune.io.json_types import JsonMapping
from trietune.io.name_patterns import PatternError, compile_pattern, matching

# Axes whose devices split a batch, by the names that files give them.
DATA_AXES = ("data", "batch", "dp")
# What PEFT puts in front of a network's own names, and around an adapted layer; patterns may be written for either.
PEFT_PREFIX, PEFT_LAYER = "base_model.model.", ".base_layer"


@dataclass(frozen=True, slots=True)
class Sharding:
    """Weights that are split.

    Attributes:
        pattern: searched in a module's name, or in a parameter's.
        axes: for each dimension of the weight, the mesh axis over which it is split; None where it is not.
    """

    pattern: str
    axes: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Mesh:
    """Several devices in a grid.

    Attributes:
        shape, axis_names: the grid.
        data_axis: whose devices split a batch; None if each sees all of it.
        shardings: the first whose pattern is found in a name decides; other weights are on every device.
    """

    shape: tuple[int, ...]
    axis_names: tuple[str, ...]
    data_axis: str | None
    shardings: tuple[Sharding, ...] = ()

    @property
    def num_rows(self) -> int:
        """Devices that split a batch."""
        return 1 if self.data_axis is None else self.shape[self.axis_names.index(self.data_axis)]

    def axes_of(self, name: str) -> tuple[tuple[str | None, ...], str] | None:
        """How the weight of the module `name` is split, and the pattern that says so; None if it is not."""
        plain = name.replace(PEFT_LAYER, "")
        candidates = [f"{prefix}{form}{end}" for prefix in ("", PEFT_PREFIX) for form in (name, plain) for end in ENDS]
        for sharding in self.shardings:
            if _is_found(sharding.pattern, candidates):
                return sharding.axes, sharding.pattern
        return None


ENDS = ("", ".weight")


def _is_found(pattern: str, candidates: Sequence[str]) -> bool:
    try:
        return bool(matching(pattern, candidates, whole=False))
    except PatternError as error:
        raise UserError(
            f"`{pattern[:80]}` {error}", where="`model_sharding_patterns`", next_step="write it without nested repeats"
        ) from error


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """A mesh, or None for one device, and what the compiler is told: names and values as text."""

    mesh: Mesh | None = None
    compile_options: Mapping[str, str] = field(default_factory=dict)
    trace_region_mb: int | None = None


def read_mesh(
    *,
    strategy: str,
    shape: Sequence[int] | None,
    axis_names: Sequence[str] | None,
    shardings: JsonMapping | Sequence[object] | None,
    data_dimension: str | int | None,
    where: str,
) -> Mesh | None:
    """The mesh that the settings describe; None if they ask for one device.

    Args:
        strategy: `single`, `data_parallel`, `fsdp` or `tensor_parallel`.
        shardings: `{parameter name: axes}`, or pairs of a pattern and axes.
        data_dimension: name or number of the axis that splits a batch; None takes one that is called so.

    Raises:
        UserError: axes that do not exist, patterns that are none, a strategy without what it needs.
    """
    if shape is None:
        # Without a grid, these two mean processes.
        if strategy not in ("single", "data_parallel", "fsdp"):
            raise UserError(
                f"`parallelism_strategy: {strategy}` needs the devices' grid",
                where=where,
                next_step='`mesh_shape: "2,1"`, the sizes along `data` and `model`',
            )
        return None
    names = tuple(axis_names) if axis_names else ("data", "model")[: len(shape)]
    if len(names) != len(shape):
        raise UserError(
            f"the {len(shape)} axes of `mesh_shape` need names",
            where=where,
            next_step='`mesh_axis_names: ["data", "model"]`, one for each axis',
        )
    mesh = Mesh(
        tuple(shape),
        names,
        _data_axis(tuple(shape), names, data_dimension, where),
        tuple(_read_sharding(item, names, where) for item in _pairs(shardings, where)),
    )
    if strategy == "data_parallel" and mesh.num_rows == 1:
        raise UserError(
            f"`parallelism_strategy: data_parallel`, but no axis of the mesh splits a batch: {_shown(mesh)}",
            where=where,
            next_step="`input_sharding_dim:` with the name of an axis longer than 1, or call one `data`",
        )
    if strategy == "tensor_parallel" and not mesh.shardings:
        raise UserError(
            "`parallelism_strategy: tensor_parallel` needs the weights that are split",
            where=where,
            next_step=r'`model_sharding_patterns: [["\\.(q|k|v)_proj", ["model", null]], ...]`',
        )
    return mesh


def compile_option(value: object) -> str:
    """As the compiler's interface takes it: text, truth in lower case."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _data_axis(shape: tuple[int, ...], names: tuple[str, ...], asked: str | int | None, where: str) -> str | None:
    if asked is None:
        called_so = [name for name, size in zip(names, shape, strict=True) if name in DATA_AXES and size > 1]
        return called_so[0] if called_so else None
    if isinstance(asked, int) and asked < len(names):
        return names[asked]
    if asked not in names:
        raise UserError(
            f"`input_sharding_dim: {asked}` is not an axis of the mesh",
            where=where,
            next_step=f"write one of {', '.join(names)}",
        )
    return str(asked)


def _pairs(shardings: JsonMapping | Sequence[object] | None, where: str) -> list[tuple[str, object]]:
    if isinstance(shardings, Mapping):
        return [(f"^{re.escape(name)}$", axes) for name, axes in shardings.items()]
    pairs = []
    for item in shardings or ():
        if not isinstance(item, Sequence) or isinstance(item, str) or len(item) != 2 or not isinstance(item[0], str):
            raise UserError(
                f"`{item}` is not a pair of a pattern and axes",
                where=where,
                next_step=r'write it as `["\\.q_proj", ["model", null]]`',
            )
        pairs.append((item[0], item[1]))
    return pairs


def _read_sharding(pair: tuple[str, object], names: tuple[str, ...], where: str) -> Sharding:
    pattern, axes = pair
    try:
        compile_pattern(pattern)
    except PatternError as error:
        raise UserError(
            f"`{pattern}` is not a regular expression: it {error}", where=where, next_step="write a dot as `\\\\.`"
        ) from None
    if not isinstance(axes, Sequence) or isinstance(axes, str):
        raise UserError(
            f"the axes of `{pattern}` are not a list", where=where, next_step='write, for example, `["model", null]`'
        )
    resolved = tuple(names[axis] if isinstance(axis, int) and axis < len(names) else axis for axis in axes)
    for axis in resolved:
        if axis is not None and axis not in names:
            raise UserError(
                f"`{axis}`, over which `{pattern}` is split, is not an axis of the mesh",
                where=where,
                next_step=f"write one of {', '.join(names)}, or null",
            )
    return Sharding(pattern, resolved)


def _shown(mesh: Mesh) -> str:
    return ", ".join(f"{name} {size}" for name, size in zip(mesh.axis_names, mesh.shape, strict=True))
