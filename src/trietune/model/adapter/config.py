"""`adapter_config.json`: the keys that we write, and the only ones that we read.

PEFT's own reader takes any key, and some of them name Python modules to import or other models to load. So a file is
read against the table below: a key has its type, or must hold the value that means nothing, or is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from peft import LoraConfig

from trietune.errors import UserError, in_short
from trietune.io import strict_json
from trietune.io.adapter_place import CONFIG_FILE as CONFIG_FILE
from trietune.io.name_patterns import PatternError, compile_pattern

MAX_CONFIG_BYTES = 1 * 2**20
MAX_RANK = 4096
_MAX_TEXT = 4096
_MAX_NAMES = 100_000
_MAX_PATTERN = 1024
# PEFT puts these names into patterns of its own.
_PLAIN_NAME = re.compile(r"[\w.-]{1,512}", re.ASCII)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT


def _is_pattern(value: object) -> bool:
    """A regular expression in Python's syntax; `module_names` sees to it that it ends in good time."""
    if not isinstance(value, str) or len(value) > _MAX_PATTERN:
        return False
    try:
        compile_pattern(value)
    except PatternError:
        return False
    return True


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) <= _MAX_NAMES and all(_is_text(name) for name in value)


def _is_plain_names(value: object) -> bool:
    return _is_names(value) and all(_PLAIN_NAME.fullmatch(name) for name in value)  # type: ignore[attr-defined]


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value <= MAX_RANK


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e9  # type: ignore[arg-type]


def _is_probability(value: object) -> bool:
    return _is_number(value) and 0 <= value < 1  # type: ignore[operator]


def _is_layers(value: object) -> bool:
    one = type(value) is int and 0 <= value < 100_000
    return one or (isinstance(value, list) and 0 < len(value) < 100_000 and all(_is_layers(item) for item in value))


def _is_by_pattern(check: Callable[[object], bool]) -> Callable[[object], bool]:
    def is_by_pattern(value: object) -> bool:
        return (
            isinstance(value, dict)
            and len(value) <= _MAX_PATTERN
            and all(_is_pattern(name) and check(number) for name, number in value.items())
        )

    return is_by_pattern


def _or_none(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


# What we honor. The words are for the message when a value is of another kind.
_HONORED: dict[str, tuple[Callable[[object], bool], str]] = {
    "peft_type": (lambda value: value == "LORA", "`LORA`"),
    # Where nobody said, PEFT writes null; the base model decides.
    "task_type": (lambda value: value in (None, "CAUSAL_LM"), "`CAUSAL_LM`, or null"),
    "peft_version": (_or_none(_is_text), "text"),
    "base_model_name_or_path": (_or_none(_is_text), "text"),
    "revision": (_or_none(_is_text), "text"),
    "inference_mode": (_is_flag, "true or false"),
    "r": (_is_rank, f"a whole number from 1 to {MAX_RANK}"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (_is_probability, "a number from 0 to below 1"),
    "target_modules": (
        lambda value: value is None or value == [] or _is_pattern(value) or _is_names(value),
        "a pattern or a list of names",
    ),
    "target_parameters": (lambda value: value is None or value == [] or _is_names(value), "a list of names"),
    "exclude_modules": (
        _or_none(lambda value: _is_pattern(value) or _is_names(value)),
        "a pattern or a list of names",
    ),
    "modules_to_save": (_or_none(_is_plain_names), "a list of names"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "fan_in_fan_out": (_is_flag, "true or false"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "layers_to_transform": (_or_none(_is_layers), "a layer's number or a list of them"),
    "layers_pattern": (_or_none(_is_pattern), "a pattern"),
    "rank_pattern": (_is_by_pattern(_is_rank), "ranks by name"),
    "alpha_pattern": (_is_by_pattern(_is_number), "numbers by name"),
}

# Keys of PEFT that change what an adapter computes, or load something, and that we do not offer: only the value that
# switches them off is taken. `init_lora_weights` concerns a start that the file's tensors replace, as long as it is one
# that leaves the base model alone.
_OFF: dict[str, tuple[object, ...]] = {
    "init_lora_weights": (True, False, "gaussian"),
    "megatron_config": (None,),
    "megatron_core": (None, "megatron.core"),
    "trainable_token_indices": (None,),
    "loftq_config": (None, {}),
    "eva_config": (None,),
    "corda_config": (None,),
    "lora_ga_config": (None,),
    "velora_config": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "qalora_group_size": (16,),
    "monteclora_config": (None,),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "ensure_weight_tying": (False,),
}

# Read over, whatever it holds: `auto_mapping` names a Python module to import a model's class from, and the base model
# is known here. It is neither imported nor handed to PEFT.
_READ_OVER = ("auto_mapping",)

_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
# Written so that any PEFT since rsLoRA reads the file; newer keys hold their defaults and are left out.
_NOT_WRITTEN = ("peft_version",)


def config_for_file(config: LoraConfig, *, base_name: str, revision: str | None) -> dict[str, object]:
    """The document to write: plain JSON, sets sorted, so that equal adapters give equal bytes."""
    document: dict[str, object] = {"auto_mapping": None, "init_lora_weights": True}
    for key in _HONORED:
        if key not in _NOT_WRITTEN:
            document[key] = _plain(getattr(config, key))
    if not document["target_parameters"]:
        del document["target_parameters"]
    document |= {"base_model_name_or_path": base_name, "revision": revision, "inference_mode": True}
    return document


def parse_config(data: bytes, *, where: str) -> LoraConfig:
    """The configuration that a file holds. Raises `UserError` for anything that is not in the table above."""
    try:
        document = strict_json.parse(data, max_bytes=MAX_CONFIG_BYTES)
    except strict_json.NotStrict as error:
        raise UserError(f"`{where}` cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"`{where}` is not an adapter's configuration: it is not a JSON object")
    if missing := [key for key in _REQUIRED if key not in document]:
        raise UserError(f"`{where}` is not an adapter's configuration: `{missing[0]}` is missing")
    for key, value in document.items():
        _check(key, value, where)
    if not document["target_modules"] and not document.get("target_parameters"):
        raise UserError(f"`{where}` has neither `target_modules` nor `target_parameters`: the adapter is on nothing")
    honored = {key: value for key, value in document.items() if key in _HONORED and key != "peft_version"}
    honored["task_type"] = "CAUSAL_LM"
    try:
        return LoraConfig(**honored)
    except ValueError as error:
        raise UserError(f"`{where}` cannot be used: {str(error).splitlines()[0]}") from error


def _check(key: str, value: object, where: str) -> None:
    if key in _HONORED:
        is_right, kind = _HONORED[key]
        if not is_right(value):
            raise UserError(f"`{key}` in `{where}` must be {kind}, and is {_shown(value)}")
    elif key in _READ_OVER:
        return
    elif key not in _OFF:
        raise UserError(f"`{where}` has the key `{_shown(key)}`, which no LoRA adapter needs; nothing was loaded")
    elif not any(type(value) is type(off) and value == off for off in _OFF[key]):
        raise UserError(
            f"`{where}` sets `{key}` to {_shown(value)}, which TrieTune does not support; nothing was loaded",
            next_step="load it with peft, if you trust where it comes from",
        )


def _shown(value: object) -> str:
    return in_short(str(value), 60)


def _plain(value: object) -> object:
    if isinstance(value, set):
        return sorted(value)
    if hasattr(value, "value"):  # an enumeration of PEFT's
        return value.value
    return value
