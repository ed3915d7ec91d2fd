"""Make what transformers 5 writes mean the same to readers that know the older names.

transformers 5 keeps the base of rotary positions inside `rope_parameters`. A reader that looks for `rope_theta` finds
none there and takes its default of 10,000 without a word: transformers 4, mlx-lm and the converters of llama.cpp and
Ollama do. So a merged model's `config.json` holds both forms:

    "rope_parameters": {"rope_type": "default", "rope_theta": 100000}      transformers 5
    "rope_theta": 100000, "rope_scaling": null                             everybody else

Tokenizers have two such names: the class `TokenizersBackend`, which was `PreTrainedTokenizerFast`, and a list
`extra_special_tokens`, which was `additional_special_tokens`; transformers 4 stops at either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trietune.model.base.load import quiet_library

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

_DTYPE_KEYS = ("dtype", "torch_dtype")
# How weights are stored and who wrote the file; everything else may decide what is computed.
_NO_MEANING = (*_DTYPE_KEYS, "architectures", "transformers_version", "_name_or_path")
# What transformers 5 calls a tokenizer that is nothing but its `tokenizer.json`, and the name that 4 knows as well.
_TOKENIZER_CLASSES = {
    "TokenizersBackend": "PreTrainedTokenizerFast",
    "TokenizersBackendFast": "PreTrainedTokenizerFast",
}
# Names in `rope_parameters` that stood beside it before, in the configuration itself.
_BESIDE_ROPE = ("rope_theta", "partial_rotary_factor")
# What Gemma 3 called the two bases that transformers 5 files under a kind of layer each.
_ROPE_OF_LAYERS = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}


def portable_config(written: Mapping[str, object], base: Mapping[str, object], *, dtype: str) -> dict[str, object]:
    """The `config.json` of a merged model, in names that old and new readers know.

    The base model's own file is carried over where it describes the same class, since its readers have proved
    themselves on it.

    Args:
        written: what transformers wrote for the merged network.
        base: the base model's own `config.json`.
        dtype: dtype of the stored weights, such as `bfloat16`.
    """
    is_same_class = base.get("model_type") == written.get("model_type") and (
        base.get("architectures") in (None, written.get("architectures"))
    )
    config = {**base} if is_same_class else {**written}
    if config.get("architectures") is None:
        config["architectures"] = written.get("architectures")
    config = _with_old_names(config)
    for key in _DTYPE_KEYS:
        config[key] = dtype
    for name, nested in config.items():
        if isinstance(nested, dict) and any(key in nested for key in _DTYPE_KEYS):
            config[name] = {**nested, **dict.fromkeys(_DTYPE_KEYS, dtype)}
    return config


def _with_old_names(config: Mapping[str, object]) -> dict[str, object]:
    """The same with `rope_theta` and its like beside `rope_parameters`, in nested configurations too."""
    result = {
        name: _with_old_names(value) if isinstance(value, dict) and "model_type" in value else value
        for name, value in config.items()
    }
    rope = result.get("rope_parameters")
    if isinstance(rope, dict):
        for name, value in old_rope(rope).items():
            if result.get(name) is None:
                result[name] = value
    return result


def old_rope(rope: Mapping[str, object]) -> dict[str, object]:
    """`rope_parameters` of transformers 5 as the keys that stood in the configuration before.

    >>> old_rope({"rope_type": "default", "rope_theta": 5e5})
    {'rope_theta': 500000.0, 'rope_scaling': None}
    """
    of_layers = {kind: value for kind, value in rope.items() if isinstance(value, dict)}
    if of_layers:
        bases = {
            _ROPE_OF_LAYERS[kind]: value["rope_theta"]
            for kind, value in of_layers.items()
            if kind in _ROPE_OF_LAYERS and "rope_theta" in value
        }
        return {**bases, "rope_scaling": _scaling(of_layers.get("full_attention", {}))}
    beside = {name: rope[name] for name in _BESIDE_ROPE if rope.get(name) is not None}
    return {**beside, "rope_scaling": _scaling(rope)}


def _scaling(rope: Mapping[str, object]) -> dict[str, object] | None:
    """`rope_scaling` as before; None where positions are not scaled. Both spellings of its kind are written."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    scaling = {name: value for name, value in rope.items() if name not in _BESIDE_ROPE}
    return {**scaling, "rope_type": kind, "type": kind}


def portable_tokenizer_config(config: Mapping[str, Any]) -> dict[str, object]:
    """`tokenizer_config.json` with the class and the keys that transformers 4 and 5 both read."""
    result = dict(config)
    name = result.get("tokenizer_class")
    if isinstance(name, str):
        result["tokenizer_class"] = _TOKENIZER_CLASSES.get(name, name)
    extra = result.get("extra_special_tokens")
    if isinstance(extra, list):
        del result["extra_special_tokens"]
        if extra:
            more = [token for token in result.get("additional_special_tokens") or [] if token not in extra]
            result["additional_special_tokens"] = [*more, *extra]
    for name in ("is_local", "local_files_only", "backend"):
        # How the file was loaded when it was written, and nothing about the tokenizer.
        result.pop(name, None)
    return result


def write_portable(folder: Path, base: Path, *, dtype: str, chat_template: str) -> None:
    """Rewrite the `config.json` and tokenizer files of the merged model in `folder`.

    Args:
        base: the base model's folder.
        chat_template: the template that the adapter was trained with; empty if it was not trained on conversations.
    """
    written = _read(folder / CONFIG)
    meant = _meaning(folder)
    _write(folder / CONFIG, portable_config(written, _read(base / CONFIG), dtype=dtype))
    if _meaning(folder) != meant:
        # The base's file describes another model than was loaded from it, so it is not carried over.
        _write(folder / CONFIG, portable_config(written, {}, dtype=dtype))
    tokenizer_config = folder / TOKENIZER_CONFIG
    if tokenizer_config.is_file():
        config = portable_tokenizer_config(_read(tokenizer_config))
        if chat_template:
            config["chat_template"] = chat_template
        _write(tokenizer_config, config)
    if chat_template:
        # The base's own would win over the one in `tokenizer_config.json`.
        (folder / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
        (folder / "chat_template.json").unlink(missing_ok=True)


def _meaning(folder: Path) -> dict[str, object]:
    """What the installed transformers reads in `config.json`, less what says nothing about the network."""
    from transformers import AutoConfig

    with quiet_library():
        content: dict[str, object] = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).to_dict()
    return {name: value for name, value in content.items() if name not in _NO_MEANING}


def _read(path: Path) -> dict[str, object]:
    content = json.loads(path.read_bytes())
    assert isinstance(content, dict), path
    return content


def _write(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
