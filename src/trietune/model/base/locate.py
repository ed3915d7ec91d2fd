"""From `model_name` to a local folder with config, safetensors and tokenizer.

    google/gemma-1.1-2b-it            a hub id (`hub.py`); `...-it@REVISION` takes a branch, tag or commit
    models/gemma, ~/models/gemma      a folder
    SmolLM2-135M-Instruct.Q4_1.gguf   a GGUF file, converted once (`gguf.py`)
    smollm2-135m-instruct             the sample model, a GGUF file inside a Python package (`demo`)

Only data is fetched and read: configuration, safetensors, tokenizer files. A pickle (`.bin`, `.pt`, `.pth`) can run
code when it is opened, so a model that has nothing else is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trietune.demo import DEMO_MODEL, smollm2_gguf
from trietune.errors import UserError

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

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A base model on this disk.

    `name` is what the user wrote, without `@revision`: adapters record it as their base. `revision` is the commit that
    a hub id was resolved to. `digest` is the SHA-256 of a GGUF file, in hex.
    """

    path: Path
    name: str
    source: Literal["hub", "folder", "gguf"]
    revision: str | None = None
    digest: str | None = None


def locate_model(
    model_name: str,
    *,
    token: str | None = None,
    report: Report = lambda text: None,
    progress: Progress = lambda phase, done, total: None,
) -> ModelFolder:
    """Find the model, fetching or converting it if need be.

    Args:
        model_name: hub id (with `@revision`), folder, or `.gguf` file.
        token: for the hub; None takes the hub library's own (`HF_TOKEN`, or the one of `hf auth login`).
        report: gets one line for each decision that the user should see.
        progress: gets a phase, the bytes done and the bytes in all.

    Raises:
        UserError: whatever keeps the model from being found, fetched or loaded safely.
    """
    if model_name.lower() == DEMO_MODEL:
        return _take_gguf(smollm2_gguf(), DEMO_MODEL, report)
    place = Path(model_name).expanduser()
    if place.is_dir():
        return _take_folder(place, model_name)
    if place.suffix.lower() == ".gguf":
        return _take_gguf(place, model_name, report)
    if place.is_file():
        raise UserError(
            f"`model_name: {model_name}` is a file, but not a .gguf file",
            next_step="give the folder that holds config.json and the safetensors, or a .gguf file",
        )
    repo, _, revision = model_name.partition("@")
    if not _HUB_ID.fullmatch(repo) or repo.startswith((".", "/", "~")):
        raise UserError(
            f"`model_name: {model_name}` is no folder here, and cannot be a hub id (owner/name)",
            where=f"looked in {Path.cwd()}" if not place.is_absolute() else None,
            next_step="check the path, or write an id such as `google/gemma-1.1-2b-it`",
        )
    from trietune.model.base.hub import fetch

    folder = fetch(repo, revision or None, token=token, report=report, progress=progress)
    check_folder(folder)
    # The hub's library keeps each commit in a folder of that name.
    return ModelFolder(path=folder, name=repo, source="hub", revision=folder.name)


def _take_folder(folder: Path, model_name: str) -> ModelFolder:
    check_folder(folder)
    return ModelFolder(path=folder, name=model_name, source="folder")


def _take_gguf(file: Path, model_name: str, report: Report) -> ModelFolder:
    if not file.is_file():
        in_repository = re.fullmatch(r"([\w.-]+/[\w.-]+)/(.+\.gguf)", model_name)
        raise UserError(
            f"`model_name: {model_name}`: there is no such file",
            where=f"looked in {Path.cwd()}" if not file.is_absolute() else None,
            next_step=f"hf download {in_repository[1]} {in_repository[2]} --local-dir ."
            if in_repository
            else "check the path; a relative one starts where the command runs",
        )
    from trietune.model.base.gguf import convert_gguf

    folder, digest = convert_gguf(file, report=report)
    return ModelFolder(path=folder, name=model_name, source="gguf", digest=digest)


def check_folder(folder: Path) -> None:
    """Raise a `UserError` unless `folder` holds a causal model's config and all of its safetensors."""
    names = sorted(path.name for path in folder.iterdir())
    check_names(str(folder), names)
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"`{folder / 'config.json'}` is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(
            f"`{folder / 'config.json'}` names no `model_type`, so nobody can tell what model it is",
            next_step="take config.json from the page that the weights come from",
        )
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


def check_names(place: str, names: Sequence[str]) -> None:
    """Judge a folder or a repository by the names of its files alone; before anything is fetched."""
    if "adapter_config.json" in names and "config.json" not in names:
        raise UserError(
            f"`{place}` is an adapter, not a base model",
            next_step="`model_name` is the model under it, `base_model_name_or_path` in its adapter_config.json",
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
            f"`{place}` has no config.json, so it is no model that can be loaded",
            next_step="give the folder that directly holds config.json and the safetensors",
        )
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if not has_weights and pickles:
        raise UserError(
            f"`{place}` has its weights only as `{pickles[0]}`, a pickle, which can run any code when it is opened",
            where="TrieTune reads safetensors and GGUF alone",
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
