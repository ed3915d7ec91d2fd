"""A network as it will be trained, counted before anything is loaded: its adapters, and what they do not reach.

Imported once a device has been chosen: transformers starts XLA devices when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trietune.errors import UserError
from trietune.io.json_types import JsonObject
from trietune.io.places import expand
from trietune.model.adapter.export import find_adapter
from trietune.model.adapter.start import keys_of
from trietune.model.adapter.targets import SMALLEST_NAMED, Coverage
from trietune.model.base.shape import NetworkShape, describe_network
from trietune.model.states.memory import STATES_HAVE_MANY_LENGTHS
from trietune.run.device_plan import check_sharding

if TYPE_CHECKING:
    from trietune.config.settings import Settings
    from trietune.device import Device
    from trietune.run.opening import Opened


def describe(settings: Settings, opened: Opened) -> NetworkShape:
    """The network of `opened` with its adapter.

    Raises:
        UserError: it cannot be sharded as asked, or its batches cannot be computed as a trie.
    """
    arguments = adapter_arguments(settings)
    shape = describe_network(opened.base, dtype=opened.dtype, adapter=arguments, base_dropout=settings.base_dropout)
    check_sharding(settings, shape)
    return shape


def check_trie(settings: Settings, name: str, shape: NetworkShape) -> None:
    """Refuse tries of a network that computes something else on them.

    Raises:
        UserError: naming what that is.
    """
    if settings.batching == "padded" or shape.refusal is None:
        return
    raise UserError(
        f"batches of `{name}` cannot be computed as a trie: {shape.refusal}",
        where=f"`batching: {settings.batching}` ({settings.where('batching')})",
        next_step="`--set base_dropout=False`"
        if settings.base_dropout and "base_dropout" in shape.refusal
        else "`--set batching=padded`, which trains it on plain rows",
    )


def check_trie_on(settings: Settings, name: str, shape: NetworkShape, device: Device) -> None:
    """Refuse tries that run on whole rows or carry states, on a device of static shapes.

    Raises:
        UserError: naming why.
    """
    why = STATES_HAVE_MANY_LENGTHS if shape.carries_states else shape.why_whole_rows
    if settings.batching != "padded" and why is not None and device.has_static_shapes:
        raise UserError(
            f"batches of `{name}` cannot be computed as a trie on {device.name}: {why}",
            where=f"`batching: {settings.batching}` ({settings.where('batching')})",
            next_step="`--set batching=padded`, which trains it on plain rows",
        )


def check_longest(settings: Settings, name: str, shape: NetworkShape, longest: int) -> None:
    """Refuse examples so long that the model rotates all rows of a call by other angles.

    Raises:
        UserError: naming how long they may be.
    """
    if settings.batching != "padded" and shape.longest_in_a_trie is not None and longest > shape.longest_in_a_trie:
        raise UserError(
            f"batches of `{name}` cannot be computed as a trie: an example of {longest:,} tokens is longer than "
            f"{shape.longest_in_a_trie:,}, beyond which it rotates all rows of a call by other angles",
            where="config.json: rope_type `longrope` or `dynamic`",
            next_step=f"`--set max_length={shape.longest_in_a_trie}`, or `--set batching=padded`, which rotates "
            "short rows beside long ones as transformers does",
        )


def find_start(settings: Settings) -> Path | None:
    """Folder of the adapter that training begins with; None begins with a new one."""
    return None if settings.start_adapter is None else find_adapter(expand(settings.start_adapter))


def with_start(settings: Settings, start: Path | None, report: Callable[[str], None]) -> Settings:
    """The settings with what the initial adapter was trained with, in keys that nobody has written.

    Raises:
        UserError: the adapter cannot be read.
    """
    if start is None:
        return settings
    brought = {
        key: value
        for key, value in keys_of(start).items()
        if settings.where(key) == "default" and getattr(settings, key) != value
    }
    if brought:
        shown = ", ".join(f"{key} {_shown(value)}" for key, value in brought.items())
        report(f"from the adapter that training begins with: {shown}")
    return settings.model_copy(update=brought)


def _shown(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return ", ".join(map(str, value[:8])) + (f" and {len(value) - 8} more" if value[8:] else "")


def adapter_arguments(settings: Settings) -> JsonObject:
    """Keyword arguments of `add_adapter`."""
    return {
        "r": settings.lora_r,
        "alpha": settings.lora_alpha,
        "dropout": settings.lora_dropout,
        "target_modules": settings.lora_target_modules,
        "target_parameters": settings.lora_target_parameters,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "bias": settings.lora_bias,
        "modules_to_save": settings.modules_to_save or None,
        "seed": settings.seed,
    }


def uncovered(settings: Settings, coverage: Coverage) -> list[str]:
    """What carries no adapter although `all-linear` sounds as if it did, in sentences; nothing where names were given.

    Raises:
        UserError: nothing carries one.
    """
    if settings.lora_target_modules != "all-linear":
        return []
    groups = [f"{name} ({share:.0%})" for name, share in coverage.without if share >= SMALLEST_NAMED]
    sentences = []
    if groups:
        shown = ", ".join(groups[:6]) + (f" and {len(groups) - 6} more" if len(groups) > 6 else "")
        advice = ""
        experts = [name.rpartition(".")[2] for name, _ in coverage.without if ".experts." in name]
        if experts and settings.lora_target_parameters == "auto":
            advice = f"; `lora_target_parameters: [{', '.join(dict.fromkeys(experts))}]` adapts the experts"
        sentences.append(f"adapters cover {coverage.share:.0%} of the layers' weights; not covered: {shown}{advice}")
    return sentences
