"""A base model's folder on this disk, and what must be in it before anything of it is read.

Only data is fetched and read: configuration, safetensors, tokenizer files. A pickle (`.bin`, `.pt`, `.pth`) can run
code when it is opened, so a model that has nothing else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trietune.errors import UserError
from trietune.io import strict_json
from trietune.io.causes import first_line

Report = Callable[[str], None]
Progress = Callable[[str, int, int | None], None]

# What a tokenizer may consist of; not all of it is there for any one.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

# Keys by which a configuration can ask for another implementation, of attention or of anything else.
_CHOICES_OF_KERNELS = frozenset(
    f"{prefix}{what}{suffix}"
    for what in ("attn_implementation", "experts_implementation")
    for prefix in ("", "_")
    for suffix in ("", "_internal")
) | {"use_kernels", "kernel_config", "hub_kernels", "allow_all_kernels"}
_BUILT_IN = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")

# Layers, experts, and entries of any list: the deepest models have some 130 layers and 512 experts.
MOST_LAYERS, _MOST_PARTS = 1_000, 10_000

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A base model on this disk.

    `name` is what the user wrote, without `@revision`: adapters record it as their base. `revision` is the commit that
    a hub id was resolved to. `digest` is the SHA-256 of a GGUF file, in hex, and `weights_digest` tells what it was
    converted to.
    """

    path: Path
    name: str
    source: Literal["hub", "folder", "gguf"]
    revision: str | None = None
    digest: str | None = None
    weights_digest: str | None = None


def check_folder(folder: Path) -> None:
    """Raise a `UserError` unless `folder` holds a causal model's config and all of its safetensors."""
    names = sorted(path.name for path in folder.iterdir())
    check_names(str(folder), names)
    config = read_config(folder)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(
            f"`{folder / 'config.json'}` names no `model_type`, so it is not clear what model it is",
            next_step="take config.json from the page that the weights come from",
        )
    _check_implementations(config, folder / "config.json")
    _check_sizes(config, folder / "config.json")
    for name in names:
        if name.endswith(".safetensors"):
            _check_not_a_pointer(folder / name)
    for index in (name for name in names if name.endswith(".safetensors.index.json")):
        missing = sorted(_indexed_files(folder / index) - set(names))
        if missing:
            raise UserError(
                f"`{folder}` lacks {len(missing)} of its weight files, the first is `{missing[0]}`",
                where=f"they are listed in {index}",
                next_step="finish the download, then run the same command again",
            )


def read_config(folder: Path) -> Any:
    """What config.json says, judged by nobody yet. Raises `UserError` if that cannot be read."""
    path = folder / "config.json"
    try:
        if not path.is_file():
            raise UserError(f"`{path}` is not a plain file", next_step="download the model again")
        if path.stat().st_size > strict_json.MAX_BYTES:
            raise UserError(f"`{path}` has {path.stat().st_size:,} bytes, too many for a configuration")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"`{path}` is not JSON: {first_line(error)}", next_step="download the model again") from error


def _check_sizes(config: Mapping[str, Any], where: Path, path: str = "") -> None:
    """Refuse what would take for ever to build, or to say no: every layer and expert is an object of Python."""
    for key, value in config.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict):
            _check_sizes(value, where, name)
        most = MOST_LAYERS if "layer" in key.lower() or "depth" in key.lower() else _MOST_PARTS
        is_size = isinstance(value, int) and any(word in key.lower() for word in ("layer", "depth", "expert"))
        size = value if is_size else len(value) if isinstance(value, list) else 0
        if size > most:
            raise UserError(
                f"`{where}` describes {size:,} parts of a network (`{name}`), more than the {most:,} allowed",
                where="no model that is known has a tenth of them",
                next_step="take config.json from the page that the weights come from",
            )


def _check_implementations(config: Mapping[str, Any], where: Path, path: str = "") -> None:
    """Refuse a configuration that chooses kernels: transformers fetches some of them from the hub, as code."""
    for key, value in config.items():
        name = f"{path}.{key}" if path else str(key)
        if key in _CHOICES_OF_KERNELS and not _is_built_in(value):
            raise UserError(
                f"`{where}` asks for {name}: `{str(value)[:60]}`, which may be code from elsewhere",
                where="TrieTune chooses by itself how a model attends (`attention`), and loads no kernels by name",
                next_step=f"remove `{key}` from that file",
            )
        for part in value if isinstance(value, list) else (value,):
            if isinstance(part, dict):
                _check_implementations(part, where, name)


def _is_built_in(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_built_in, value.values()))
    return value is None or value is False or (isinstance(value, str) and value in _BUILT_IN)


def check_names(place: str, names: Sequence[str]) -> None:
    """Judge a folder or a repository by only the names of its files; before anything is fetched."""
    if "adapter_config.json" in names and "config.json" not in names:
        raise UserError(
            f"`{place}` is an adapter, not a base model",
            next_step="`model_name` is the model under it, `base_model_name_or_path` in its adapter_config.json",
        )
    if "adapter_config.json" in names:
        # transformers would put that adapter onto the model by itself, with whatever PEFT reads in it.
        raise UserError(
            f"`{place}` holds both a model and an adapter (adapter_config.json), so it is not clear which is meant",
            next_step="copy the model's own files to another folder, or take the adapter out of this one: "
            "`trietune export --merge` puts it into its base",
        )
    has_weights = any(name.endswith(".safetensors") and "/" not in name for name in names)
    if "config.json" not in names:
        if any(name.endswith(".gguf") for name in names):
            raise UserError(
                f"`{place}` holds GGUF files only",
                where=", ".join(name for name in names if name.endswith(".gguf"))[:200],
                next_step="give one of them: `model_name: path/to/file.gguf`",
            )
        raise UserError(
            f"`{place}` has no config.json, so it cannot be loaded as a model",
            next_step="give the folder that directly holds config.json and the safetensors",
        )
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if not has_weights and pickles:
        raise UserError(
            f"`{place}` has its weights only as `{pickles[0]}`, a pickle, which can run any code when it is opened",
            where="TrieTune reads only safetensors and GGUF",
            next_step="take a revision with safetensors; on the hub, the pull requests of its page often have one: "
            "`model_name: owner/name@refs/pr/1`",
        )
    if not has_weights:
        raise UserError(
            f"`{place}` has no weights: no .safetensors file in it",
            next_step="finish the download, or give the folder that directly holds them",
        )


def _check_not_a_pointer(file: Path) -> None:
    with file.open("rb") as stream:
        head = stream.read(40)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"`{file}` is a Git LFS pointer, not the weights", next_step=f"git -C {file.parent} lfs pull")


def _indexed_files(index: Path) -> set[str]:
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"`{index}` is not an index of weights") from error
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise UserError(f"`{index}` names a file outside its folder: {outside[0]!r}")
    return names
