"""The spellings of a value that are accepted, and the one that the rest of the program sees.

    dtype                "torch.bfloat16"      ->  "bfloat16"
    lora_target_modules  ["all-linear"]        ->  "all-linear"       PEFT itself would look for a module of that name
                         "q_proj,v_proj"       ->  ("q_proj", "v_proj")
    mesh_shape           "8,1"                 ->  (8, 1)
    max_time             "1h30m"               ->  5400.0             seconds
    steps_freq           1e3                   ->  1000

A function here returns what it does not know unchanged: whether that is allowed is for the field to say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from os import PathLike, fspath

DTYPE_SPELLINGS: Mapping[str, str] = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}
OCCASION_SPELLINGS: Mapping[str, str] = {"none": "no"}
SCHEDULE_SPELLINGS: Mapping[str, str] = {"constant_with_warmup": "constant"}
UNPUBLISHED_MODELS: Mapping[str, str] = {
    "google/gemma-1.1-1b-it": "google/gemma-1.1-2b-it",
    "gemma-1.1-1b-it": "google/gemma-1.1-2b-it",
}

_SECONDS_PER_UNIT = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def whole_number(value: object) -> object:
    """`1e3` is a float for YAML and a number of steps for its author."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def dtype(value: object) -> object:
    if not isinstance(value, str):
        return value
    name = value.strip().removeprefix("torch.").lower()
    return DTYPE_SPELLINGS.get(name, name)


def upper_case(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def metric(value: object) -> object:
    """Later files of the original write `val/accuracy`."""
    return re.sub(r"^val/", "eval/", value) if isinstance(value, str) else value


def occasion(value: object) -> object:
    return OCCASION_SPELLINGS.get(value, value) if isinstance(value, str) else value


def schedule(value: object) -> object:
    return SCHEDULE_SPELLINGS.get(value, value) if isinstance(value, str) else value


def published_model(value: object) -> object:
    return UNPUBLISHED_MODELS.get(value.lower(), value) if isinstance(value, str) else value


def path_text(value: object) -> object:
    return fspath(value) if isinstance(value, PathLike) else value


def one_or_several(value: object) -> object:
    """A list as a tuple of texts, and a list of one as that one."""
    if not isinstance(value, list | tuple):
        return path_text(value)
    several = tuple(path_text(one) for one in value)
    return several[0] if len(several) == 1 else several


def list_of_numbers(value: object) -> object:
    """A list as a tuple, one number as a list of one, `2,1` as two numbers."""
    if isinstance(value, str) and re.fullmatch(r"\s*[\d.]+(\s*,\s*[\d.]+)*\s*", value):
        value = [float(part) for part in value.split(",")]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = [value]
    return tuple(value) if isinstance(value, list) else value


def list_of_names(value: object) -> object:
    """A list as a tuple; one name, or several with commas, as a list of names."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return tuple(value) if isinstance(value, list) else value


def list_of_names_or_auto(value: object) -> object:
    """As `list_of_names`, but for the word `auto`."""
    return "auto" if value in ("auto", ["auto"]) else list_of_names(value)


def target_modules(value: object) -> object:
    """Plain names become a list, since PEFT reads any other text than `all-linear` as one regular expression."""
    if isinstance(value, str) and value != "all-linear" and re.fullmatch(r"[\w.,\s-]+", value):
        value = list_of_names(value)
    if isinstance(value, list | tuple):
        value = tuple(value)
        return "all-linear" if value == ("all-linear",) else value
    return value


def mesh_shape(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"\s*\[?\s*\d+(\s*,\s*\d+)*\s*\]?\s*", value):
        return tuple(int(size) for size in re.findall(r"\d+", value))
    return tuple(value) if isinstance(value, list) else value


def duration_s(value: object) -> object:
    """Seconds of `90`, `90s`, `45m`, `1h30m`, `1d`, `01:30:00` or `2-00:00:00` (days first, as Slurm writes it)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if re.fullmatch(r"(\d+(\.\d+)?[dhms])+", text.replace(" ", "")):
        parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text.replace(" ", ""))
        return math.fsum(float(number) * _SECONDS_PER_UNIT[unit] for number, unit in parts)
    clock = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text)
    if clock:
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        return float(days * 86400 + hours * 3600 + minutes * 60 + seconds)
    return value


def none_if_zero(value: object) -> object:
    return None if isinstance(value, int | float) and not isinstance(value, bool) and value == 0 else value


def none_if_minus_one(value: object) -> object:
    value = whole_number(value)
    return None if isinstance(value, int) and value == -1 else value
