"""Read the settings of a run: the file, the environment, the command line, each value with its origin.

    --set key=value   before   TRIETUNE_<KEY>   before   the file   before   the default

Everything that is wrong is reported at once, with file and line, what is allowed, and what to write.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trietune.config.allowed import allowed_values, choices, takes_null, takes_text
from trietune.config.blocks import BLOCKS, COMPILE_OPTIONS, is_compiler_key, unfold
from trietune.config.checks import contradictions, without_effect
from trietune.config.defaults import ORIGINAL_DEFAULTS, is_of_the_original
from trietune.config.names import printable, unknown_key
from trietune.config.not_yet import refusals
from trietune.config.problems import Problem, as_user_error
from trietune.config.secrets import without_secrets
from trietune.config.settings import Settings
from trietune.config.yaml12 import YamlError, read_mapping, read_value, write_value
from trietune.errors import UserError, in_short
from trietune.io.half_characters import find_half_character
from trietune.io.json_types import JsonMapping

PREFIX = "TRIETUNE_"
# Variables of the program that are not configuration keys.
DEFAULTS_VARIABLE = f"{PREFIX}DEFAULTS"
OTHER_VARIABLES = frozenset({"TRIETUNE_CACHE", DEFAULTS_VARIABLE})

# A configuration has a few kilobytes; a model or a data set that is named by mistake has more.
_MAX_BYTES = 1_000_000

# Why a key allows so little.
_REASONS: Mapping[str, str] = {
    "framework": "training runs on PyTorch; the original's JAX setting trains nothing either",
    "training_type": "a LoRA adapter is trained, neither bottleneck layers nor the base model itself",
    "training_model_type": "a LoRA adapter is trained, neither bottleneck layers nor the base model itself",
    "lora_task_type": "the model learns to write text; labels are texts, too, and need no head of their own",
}
_BOOLEAN_WORDS = {
    "yes": True,
    "on": True,
    "true": True,
    "1": True,
    "no": False,
    "off": False,
    "false": False,
    "0": False,
}


@dataclass(frozen=True, slots=True)
class _Given:
    value: object
    origin: str


def load_config(
    path: Path | str | None = None,
    overrides: Sequence[str] | JsonMapping = (),
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """Settings of a run from a YAML file, the environment and overrides.

    Args:
        path: the file; None takes only defaults, environment and overrides.
        overrides: `key=value` texts as after `--set`, or a mapping of keys to Python values.
        environ: where `TRIETUNE_<KEY>` variables are looked up.

    Keys that are not set are as the original experiment had them if the file writes both `framework` and `use_tt`, or
    `TRIETUNE_DEFAULTS` is `original`, as the original's command has it.

    Raises:
        UserError: naming everything that is wrong, each with its place and a remedy.
    """
    problems: list[Problem] = []
    given: dict[str, _Given] = {}
    source = None if path is None else str(path)
    if path is not None:
        given |= _from_file(Path(path), problems)
    is_original = _asks_for_original_defaults(environ, given)
    given |= _from_environment(environ, problems)
    given |= _from_overrides(overrides, problems)
    given, notes = _unfolded(given, problems)
    known = _known_keys(given, problems)
    known = _written_whole(known, problems)
    settings = _validated(known, problems, {"is_original": is_original, "file": source})
    settings._notes = (*settings._notes, *notes)
    if problems:
        command = f"`trietune train {source} --dry-run`" if source else "`trietune train --dry-run`"
        problems.sort(key=lambda problem: problem.line)
        raise as_user_error(problems, source=source, command=command)
    return settings


def overrides_of_file(path: Path) -> list[str]:
    """The keys of a file as `key=value`, for settings that it is laid over.

    Raises:
        UserError: it cannot be read.
    """
    problems: list[Problem] = []
    given = _from_file(path, problems)
    if problems:
        raise as_user_error(problems, source=str(path), command=f"`trietune train {path} --dry-run`")
    return [f"{key}={write_value(item.value)}" for key, item in given.items()]


def show_config(settings: Settings) -> str:
    """Each key with its value and where that comes from, one per line: what `--show-config` prints."""
    rows = [(f"{key}: {write_value(value)}", settings.where(key)) for key, value in settings.dump_public().items()]
    width = min(max(len(row) for row, _ in rows), 60)
    return "\n".join(f"{row:<{width}}  # {origin}" for row, origin in rows) + "\n"


def _from_file(path: Path, problems: list[Problem]) -> dict[str, _Given]:
    text = _text_of(path)
    try:
        document = read_mapping(text)
    except YamlError as error:
        place = f"{path}, line {error.line}" if error.line else str(path)
        raise UserError(f"{place}: {error.what}", next_step=error.remedy) from None
    for refused in document.errors:
        keys = (refused.key,) if refused.key else ()
        problems.append(Problem(f"{refused.what} in {path}, line {refused.line}", None, refused.remedy, keys))
    given: dict[str, _Given] = {}
    lines: dict[str, int] = {}
    for entry in document.entries:
        if entry.key in lines:
            what = f"repeated key `{printable(entry.key)}` in {path}, line {entry.line}"
            problems.append(Problem(what, f"it is already on line {lines[entry.key]}", "remove one of the two"))
            continue
        lines[entry.key] = entry.line
        given[entry.key] = _Given(entry.value, f"{path}, line {entry.line}")
    return given


def _text_of(path: Path) -> str:
    if path.is_dir():
        inside = sorted(path.glob("*.y*ml"))
        step = f"name a file in it: {inside[0]}" if inside else "name a YAML file; `trietune init sst2` writes one"
        raise UserError(f"{path} is a folder, not a configuration file", next_step=step)
    if not path.exists():
        raise UserError(f"there is no file {path}", next_step=_nearest_file(path))
    if not path.is_file():
        raise UserError(f"{path} is not a regular file", next_step="name a YAML file; `trietune init sst2` writes one")
    try:
        if path.stat().st_size > _MAX_BYTES:
            what = f"{path} has {path.stat().st_size:,} bytes, too many for a configuration"
            raise UserError(
                what, next_step="name the YAML file; data goes under `train_file`, a model under `model_name`"
            )
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text", next_step="save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", next_step="check its permissions") from None


def _nearest_file(path: Path) -> str:
    folder = path.parent
    names = sorted(entry.name for entry in folder.glob("*.y*ml")) if folder.is_dir() else []
    nearest = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if nearest:
        return f"did you mean {' or '.join(str(folder / name) for name in nearest)}?"
    return "`trietune init sst2` writes a commented one to start from"


def _asks_for_original_defaults(environ: Mapping[str, str], in_file: Collection[str]) -> bool:
    asked = environ.get(DEFAULTS_VARIABLE, "")
    if asked not in ("", "original", "trietune"):
        raise UserError(
            f"`{DEFAULTS_VARIABLE}={printable(asked)}` is not a set of defaults",
            next_step=f"`{DEFAULTS_VARIABLE}=original`, or `trietune`, or leave it unset",
        )
    return asked == "original" or (not asked and is_of_the_original(in_file))


def _from_environment(environ: Mapping[str, str], problems: list[Problem]) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    for variable in sorted(environ):
        if variable.startswith(PREFIX) and variable not in OTHER_VARIABLES:
            key = variable.removeprefix(PREFIX).lower()
            _read_into(given, key, environ[variable], variable, problems)
    return given


def _from_overrides(overrides: Sequence[str] | JsonMapping, problems: list[Problem]) -> dict[str, _Given]:
    if isinstance(overrides, str):
        shown = printable(without_secrets(overrides))
        problems.append(Problem(f"`overrides={shown!r}` is one text", None, f"write a list: `overrides=[{shown!r}]`"))
        return {}
    if isinstance(overrides, Mapping):
        return {key: _Given(value, "argument") for key, value in overrides.items()}
    given: dict[str, _Given] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            name = printable(key)
            problems.append(Problem(f"`--set {name}` has no `=`", None, f"write `--set {name}=VALUE`"))
            continue
        _read_into(given, key.strip(), text, "--set", problems)
    return given


def _read_into(given: dict[str, _Given], key: str, text: str, origin: str, problems: list[Problem]) -> None:
    """Read one value from a command line or a variable, where text is seldom quoted and may hold colons and braces."""
    is_text = key in Settings.model_fields and takes_text(key)
    stripped = text.strip()
    try:
        if is_text and not stripped.startswith(("'", '"', "[")):
            is_null = takes_null(key) and stripped in {"", "null", "~"}
            given[key] = _Given(None if is_null else text, origin)
        else:
            given[key] = _Given(read_value(text), origin)
    except YamlError as error:
        shown = printable(without_secrets(text))
        problems.append(
            Problem(f"`{printable(key)}={shown}` ({origin}) cannot be read: {error.what}", None, error.remedy, (key,))
        )


def _unfolded(given: Mapping[str, _Given], problems: list[Problem]) -> tuple[dict[str, _Given], list[str]]:
    """Blocks and compiler keys of the original's later files, made flat; with what to say of them."""
    unfolded = unfold(
        {key: item.value for key, item in given.items()}, Settings.model_fields, lambda key: given[key].origin
    )
    taken = {key for key, item in given.items() if is_compiler_key(key) or (key in BLOCKS and _is_block(item.value))}
    flat = {key: item for key, item in given.items() if key not in taken}
    for key, (value, source) in unfolded.values.items():
        origin = given[source].origin if source in given else given["compile"].origin
        if key in flat and key != COMPILE_OPTIONS:
            what = f"`{key}` stands in the block `{source}` ({origin}) and outside of it ({flat[key].origin})"
            problems.append(Problem(what, None, "remove one of the two", (key,)))
            continue
        flat[key] = _Given(value, origin)
    for block, key, value in unfolded.unknown:
        problems.append(unknown_key(key, value, f"the block `{block}` in {given[block].origin}"))
    return flat, unfolded.notes


def _is_block(value: object) -> bool:
    return isinstance(value, Mapping)


def _known_keys(given: Mapping[str, _Given], problems: list[Problem]) -> dict[str, _Given]:
    known = {}
    for key, item in given.items():
        if key in Settings.model_fields:
            known[key] = item
        else:
            problems.append(unknown_key(key, item.value, item.origin))
    return known


def _written_whole(given: Mapping[str, _Given], problems: list[Problem]) -> dict[str, _Given]:
    """The settings without texts that no file can hold."""
    whole = {}
    for key, item in given.items():
        if (half := find_half_character(*_texts_in(item.value))) is None:
            whole[key] = item
            continue
        what = f"`{key}` ({item.origin}) holds half a character, or a byte that is not UTF-8 ({half})"
        problems.append(Problem(what, None, "write it as UTF-8; in JSON, both halves: \\ud83d\\ude00", (key,)))
    return whole


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _texts_in(pair)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts_in(one)


def _validated(given: Mapping[str, _Given], problems: list[Problem], context: JsonMapping) -> Settings:
    values = {key: item.value for key, item in given.items()}
    wrong: set[str] = {key for problem in problems for key in problem.keys}
    try:
        settings = Settings.model_validate(values, context=context)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            key = str(detail["loc"][0])
            if key not in wrong:
                wrong.add(key)
                default = _default_of(key, is_original=bool(context["is_original"]))
                problems.append(_wrong_value(key, given[key], default, detail.get("ctx", {}).get("error")))
        right = {key: value for key, value in values.items() if key not in wrong}
        settings = Settings.model_validate(right, context=context)
    settings._origins = {key: item.origin for key, item in given.items()}
    settings._notes = (*settings._notes, *without_effect(settings))
    problems += [
        problem for problem in (*contradictions(settings), *refusals(settings)) if wrong.isdisjoint(problem.keys)
    ]
    return settings


def _default_of(key: str, *, is_original: bool) -> object:
    own = Settings.model_fields[key].default
    return ORIGINAL_DEFAULTS.get(key, own) if is_original else own


def _wrong_value(key: str, item: _Given, default: object, detail: Exception | None) -> Problem:
    value = item.value
    shown = in_short(write_value(without_secrets(value)))
    what = f"`{key}: {shown}` ({item.origin}) is not allowed"
    if value is None:
        what = f"`{key}` ({item.origin}) is empty"
    reason = _REASONS.get(key)
    why = f"allowed: {allowed_values(key)}" + "".join(f"\n{extra}" for extra in (reason, detail) if extra)
    return Problem(what, why, f"write `{_assignment(key, _suggested(key, value, default), item.origin)}`", (key,))


def _assignment(key: str, value: object, origin: str) -> str:
    """How a value is written in the place where the wrong one stood."""
    text = write_value(value)
    if origin == "--set":
        return f"--set {key}={text.strip(chr(34))}"
    return f"{origin}={text.strip(chr(34))}" if origin.startswith(PREFIX) else f"{key}: {text}"


def _suggested(key: str, value: object, default: object) -> object:
    """The legal value that is nearest to what was written, else the default."""
    if takes_null(key) and (value is False or str(value).lower() in {"none", "off", "no"}):
        return None
    words = choices(key)
    if isinstance(value, str):
        near = difflib.get_close_matches(value, words, n=1, cutoff=0.6)
        if near:
            return near[0]
        if isinstance(default, bool) and value.lower() in _BOOLEAN_WORDS:
            return _BOOLEAN_WORDS[value.lower()]
        unquoted = read_value(value) if value.strip().replace(".", "").isdigit() else None
        if unquoted is not None and _is_legal(key, unquoted):
            return unquoted
    if isinstance(default, bool) and value in (0, 1):
        return bool(value)
    return default


def _is_legal(key: str, value: Any) -> bool:
    try:
        Settings(**{key: value})
    except ValidationError:
        return False
    return True
