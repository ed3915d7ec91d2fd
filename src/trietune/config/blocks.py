"""Later files of the original put keys into blocks, and compiler options among the others; here all keys are flat.

mesh: {shape: [8, 1], axis_names: [model, batch]}   ->  mesh_shape, mesh_axis_names
compile: {optimization_level: 1}                    ->  xla_compile_options: {optimization_level: 1}
math_fidelity: hifi4                                ->  xla_compile_options: {math_fidelity: hifi4}
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from trietune.io.json_types import JsonMapping, JsonObject

# What a block calls keys that have a longer name here; other names are ours, with or without the block's in front.
BLOCKS: Mapping[str, Mapping[str, str]] = {
    "logging": {"level": "log_level", "freq": "steps_freq", "project": "wandb_project", "run_name": "wandb_run_name",
                "tags": "wandb_tags", "watch_mode": "wandb_watch_mode"},
    "metrics": {"metric": "checkpoint_metric", "mode": "checkpoint_metric_mode"},
    "checkpoint": {"strategy": "save_strategy", "resume": "resume_from_checkpoint", "dir": "project_dir",
                   "storage": "storage_backend"},
    "mesh": {"names": "mesh_axis_names", "axes": "mesh_axis_names", "strategy": "parallelism_strategy"},
    "compile": {},
}  # fmt: skip
COMPILE_OPTIONS = "xla_compile_options"
# Of Tenstorrent's compiler; its experimental ones all begin alike.
COMPILER_KEYS = frozenset({
    "optimization_level", "enable_const_eval", "enable_const_eval_on_cpu", "math_fidelity", "fp32_dest_acc_en",
    "enable_bfp8_conversion", "enable_optimizer", "enable_memory_layout_analysis", "enable_l1_interleaved",
    "enable_fusing_conv2d_with_multiply_pattern", "enable_permute_matmul_fusion", "weight_dtype_overrides",
})  # fmt: skip
_EXPERIMENTAL = "experimental_"


@dataclass(frozen=True, slots=True)
class Unfolded:
    """Attributes:
    values: flat keys, each with the value and the key that it came from.
    unknown: keys of blocks that are none: block, key, value.
    notes: one sentence for each block or compiler key.
    """

    values: dict[str, tuple[object, str]]
    unknown: list[tuple[str, str, object]]
    notes: list[str]


def is_compiler_key(key: str) -> bool:
    """Whether a key is one of Tenstorrent's compiler."""
    return key in COMPILER_KEYS or key.startswith(_EXPERIMENTAL)


def unfold(given: JsonMapping, known: Collection[str], where: Callable[[str], str]) -> Unfolded:
    """What blocks and compiler keys among `given` come to; other keys are not mentioned.

    Args:
        known: our keys.
        where: the origin of a key, for the sentences.
    """
    values: dict[str, tuple[object, str]] = {}
    unknown: list[tuple[str, str, object]] = []
    notes: list[str] = []
    compiler: JsonObject = {}
    for key, value in given.items():
        if is_compiler_key(key):
            compiler[key] = value
            notes.append(
                f"`{key}` ({where(key)}) is for Tenstorrent's compiler, which gets it as one of `{COMPILE_OPTIONS}`; "
                "on other devices it changes nothing"
            )
        elif key in BLOCKS and isinstance(value, Mapping):
            names = {inner: _flat_name(key, str(inner), known) for inner in value}
            unknown += [(key, str(inner), value[inner]) for inner, name in names.items() if name is None]
            if key == "compile":
                compiler |= {str(inner): value[inner] for inner, name in names.items() if name == COMPILE_OPTIONS}
            found = {inner: name for inner, name in names.items() if name not in (None, COMPILE_OPTIONS)}
            values |= {str(name): (value[inner], key) for inner, name in found.items()}
            here = ", ".join(f"`{name}`" for name in dict.fromkeys(names.values()) if name)
            notes.append(f"`{key}` ({where(key)}) is read as {here or 'nothing: it is empty'}")
    if compiler:
        own = given.get(COMPILE_OPTIONS)
        values[COMPILE_OPTIONS] = ({**compiler, **(own if isinstance(own, Mapping) else {})}, next(iter(compiler)))
    return Unfolded(values, unknown, notes)


def _flat_name(block: str, inner: str, known: Collection[str]) -> str | None:
    for name in (BLOCKS[block].get(inner, ""), inner, f"{block}_{inner}"):
        if name in known:
            return name
    return COMPILE_OPTIONS if block == "compile" else None
