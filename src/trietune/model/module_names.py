"""The patterns of an adapter's configuration become names of modules, before PEFT sees them.

target_modules: ".*\\.q_proj"                ->  ["model.layers.0.self_attn.q_proj", ...]
rank_pattern: {"layers\\.1\\..*": 8}          ->  {"(?:model\\.layers\\.1\\.self_attn\\.q_proj|...)": 8}

PEFT matches patterns by `re`, which some of them keep busy for ever. What is matched here is what PEFT would match.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from peft import LoraConfig

from trietune.errors import UserError
from trietune.io.name_patterns import PatternError, matches, matching


def resolve_patterns(config: LoraConfig, names: Sequence[str], *, where: str) -> None:
    """Put names in place of every pattern of `config`.

    Args:
        names: names of all modules of the network.
        where: for the message.

    Raises:
        UserError: a pattern cannot be matched in good time, is none, or finds nothing to put an adapter on.
    """
    targets: object = config.target_modules
    if isinstance(config.exclude_modules, str) and config.exclude_modules:
        config.exclude_modules = _matching("exclude_modules", config.exclude_modules, names, where) or None
    if isinstance(targets, str) and targets.lower() != "all-linear":
        found = _matching("target_modules", targets, names, where)
        if not found:
            raise UserError(f"`target_modules` matches nothing in this model: `{targets[:80]}`", where=where)
        _take_exactly(config, found, names, where)
    elif config.layers_pattern and config.layers_to_transform not in (None, []):
        _take_exactly(config, _of_layers(config, names, where), names, where)
        config.layers_pattern, config.layers_to_transform = None, None
    for key in ("rank_pattern", "alpha_pattern"):
        patterns: Mapping[str, object] = getattr(config, key) or {}
        setattr(config, key, _by_name(key, patterns, names, where))


def _of_layers(config: LoraConfig, names: Sequence[str], where: str) -> list[str]:
    """Of a list of targets, those of the layers that are to be transformed; a target that is a whole name is one."""
    targets, layers = set(config.target_modules or ()), config.layers_to_transform
    wanted = {layers} if isinstance(layers, int) else set(layers or ())
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else list(config.layers_pattern or ())
    index_of: dict[str, int] = {}
    for pattern in patterns:
        for name, groups in _matches("layers_pattern", rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\..*", names, where):
            if groups["idx"] is not None:
                index_of.setdefault(name, int(groups["idx"]))
    ends = tuple(f".{target}" for target in targets)
    found = [name for name in names if name in targets or (name.endswith(ends) and index_of.get(name) in wanted)]
    if not found:
        raise UserError("`layers_to_transform` and `layers_pattern` leave nothing of this model", where=where)
    return found


def _by_name(key: str, patterns: Mapping[str, object], names: Sequence[str], where: str) -> dict[str, object]:
    """One pattern of plain names for each value; the first pattern that matches a name decides, as in PEFT."""
    value_of: dict[str, object] = {}
    for pattern, value in patterns.items():
        for name in _matching(key, rf"(?:.*\.)?(?:{pattern})", names, where):
            value_of.setdefault(name, value)
    by_value: dict[object, list[str]] = {}
    for name, value in value_of.items():
        by_value.setdefault(value, []).append(name)
    return {f"(?:{'|'.join(map(re.escape, found))})": value for value, found in by_value.items()}


def _take_exactly(config: LoraConfig, found: Iterable[str], names: Sequence[str], where: str) -> None:
    """PEFT takes a name that ends in another after a point as well, so what it would take beyond is excluded."""
    wanted = set(found)
    excluded: set[str] = set(config.exclude_modules or ())
    beyond = {name for name in names if name not in wanted and _ends_in_one_of(name, wanted)}
    if any(_ends_in_one_of(name, beyond) for name in wanted):
        raise UserError(f"`target_modules` cannot be told from {sorted(beyond)[0]} by names", where=where)
    config.target_modules = sorted(wanted)
    config.exclude_modules = sorted(excluded | beyond) or None


def _ends_in_one_of(name: str, ends: Collection[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[index:]) in ends for index in range(1, len(parts)))


def _matching(key: str, pattern: str, names: Sequence[str], where: str) -> list[str]:
    try:
        return matching(pattern, names)
    except PatternError as error:
        raise _unusable(key, pattern, error, where) from error


def _matches(key: str, pattern: str, names: Sequence[str], where: str) -> list[tuple[str, dict[str, Any]]]:
    try:
        return matches(pattern, names)
    except PatternError as error:
        raise _unusable(key, pattern, error, where) from error


def _unusable(key: str, pattern: str, error: PatternError, where: str) -> UserError:
    return UserError(f"`{key}`: `{pattern[:80]}` {error}", where=where, next_step="write the modules' names as a list")
