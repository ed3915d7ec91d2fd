"""What a key allows, in words: for messages, for the reference, and for the comments of a generated file."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from trietune.config.settings import Settings

# Keys whose accepted spellings are more than their type.
_IN_WORDS: Mapping[str, str] = {
    "dataset_id": "text, a list of texts, or null",
    "train_file": "text, a list of texts, or null",
    "validation_file": "text, a list of texts, or null",
    "data_shares": "a list of numbers above 0, at most 1000, or null",
    "lora_alpha": "a number above 0",
    "dtype": "`auto`, `bfloat16`, `float32`, or `float16`, with or without `torch.`",
    "lora_target_modules": '`"all-linear"`, a list of names, or one regular expression',
    "lora_target_parameters": '`"auto"`, or a list of names',
    "max_time": "a time such as `55m`, `1h30m` or `01:30:00`, seconds as a number, or null",
    "warmup_steps": "a whole number of steps, or a share of all steps from 0 to below 1",
    "max_grad_norm": "a number above 0, or null (off)",
    "mesh_shape": 'a list of whole numbers or text such as `"8,1"`, or null',
    "checkpoint_metric": "`eval/loss`, `eval/accuracy`, `eval/exact_match`, `eval/f1` or another metric of evaluation",
    "wandb_run_name": "a name that can also be the name of a folder",
    "storage_backend": "`local`, `s3`, `gcs`, `azure`, `hf`, or the name of an fsspec protocol",
    "lr_scheduler_type": "`constant`, `linear`, or `cosine`",
    "custom_dataset": "a mapping, or null",
    "adapter_layers": "null",
    "test_config": "null",
}


def allowed_values(key: str) -> str:
    """What may stand after `key:`, as a phrase: "a whole number of 1 or more", "`min` or `max`"."""
    return _IN_WORDS.get(key) or one_of(_phrases(Settings.model_fields[key]))


def choices(key: str) -> tuple[str, ...]:
    """The words that a key chooses from; empty if it is not of that kind."""
    return tuple(value for value in _literals(Settings.model_fields[key].annotation) if isinstance(value, str))


def takes_text(key: str) -> bool:
    """Whether any text is a legal type for the key: then a `--set` value is not read as YAML structure."""
    return any(member is str for member in _members(Settings.model_fields[key].annotation))


def takes_null(key: str) -> bool:
    annotation = Settings.model_fields[key].annotation
    return annotation is Any or any(member is type(None) for member in _members(annotation))


def one_of(phrases: Iterable[str]) -> str:
    *first, last = phrases
    if not first:
        return last
    comma = "," if len(first) > 1 or any(" " in phrase for phrase in first) else ""
    return f"{', '.join(first)}{comma} or {last}"


def _phrases(field: FieldInfo) -> list[str]:
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, metadata: Iterable[Any]) -> list[str]:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *inner_metadata = get_args(annotation)
        flat = [
            item for entry in inner_metadata for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])
        ]
        return _describe(inner, [*flat, *metadata])
    if origin in {Union, types.UnionType}:
        return [phrase for member in get_args(annotation) for phrase in _describe(member, metadata)]
    if origin is Literal:
        return [f"`{value}`" for value in get_args(annotation)]
    if annotation is type(None):
        return ["null"]
    if annotation is bool:
        return ["True", "False"]
    if annotation is int or annotation is float:
        return [("a whole number" if annotation is int else "a number") + _range(metadata)]
    if annotation is str:
        return ["text"]
    if origin is tuple:
        return ["a list of names"] if str in get_args(annotation) else ["a list of whole numbers"]
    if origin is list or annotation is list:
        return ["a list"]
    return ["a mapping"] if origin is dict or annotation is dict else ["any value"]


def _range(metadata: Iterable[Any]) -> str:
    lower = upper = ""
    for limit in metadata:
        if isinstance(limit, annotated_types.Ge):
            lower = f"of {limit.ge} or more"
        elif isinstance(limit, annotated_types.Gt):
            lower = f"above {limit.gt}"
        elif isinstance(limit, annotated_types.Le):
            upper = f"at most {limit.le}"
        elif isinstance(limit, annotated_types.Lt):
            upper = f"below {limit.lt}"
    words = ", ".join(part for part in (lower, upper) if part)
    return f" {words}" if words else ""


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in {Union, types.UnionType}:
        return [inner for member in get_args(annotation) for inner in _members(member)]
    return [annotation]


def _literals(annotation: Any) -> list[Any]:
    return [value for member in _members(annotation) if get_origin(member) is Literal for value in get_args(member)]
