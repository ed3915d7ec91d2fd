"""From `model_name` to a local folder with config, safetensors and tokenizer.

google/gemma-1.1-2b-it            a hub id (`hub.py`); `...-it@REVISION` takes a branch, tag or commit
models/gemma, ~/models/gemma      a folder
SmolLM2-135M-Instruct.Q4_1.gguf   a GGUF file, converted once (`gguf.py`)
smollm2-135m-instruct             the sample model, a GGUF file inside a Python package (`demo`)
"""

from __future__ import annotations

import re
from pathlib import Path

from trietune.demo import DEMO_MODEL
from trietune.errors import UserError
from trietune.io.places import expand
from trietune.model.base.folder import ModelFolder, Progress, Report, check_folder
from trietune.model.base.gguf import convert_gguf
from trietune.model.base.hub import fetch
from trietune.model.base.sample_model import sample_gguf

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


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
        return _take_gguf(sample_gguf(report), DEMO_MODEL, report)
    place = expand(model_name)
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
    if not is_hub_id(model_name):
        raise UserError(
            f"`model_name: {model_name}` is not a folder here, and cannot be a hub id (owner/name)",
            where=f"looked in {Path.cwd()}" if not place.is_absolute() else None,
            next_step="check the path, or write an id such as `google/gemma-1.1-2b-it`",
        )
    folder = fetch(repo, revision or None, token=token, report=report, progress=progress)
    check_folder(folder)
    # The hub's library keeps each commit in a folder of that name.
    return ModelFolder(path=folder, name=repo, source="hub", revision=folder.name)


def is_hub_id(model_name: str) -> bool:
    """Whether a name can be that of a repository on the hub, with or without `@revision`."""
    repo = model_name.partition("@")[0]
    is_file = model_name.lower() == DEMO_MODEL or repo.lower().endswith(".gguf")
    return _HUB_ID.fullmatch(repo) is not None and not repo.startswith((".", "/", "~")) and not is_file


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
    found = convert_gguf(file, report=report)
    return ModelFolder(
        path=found.folder, name=model_name, source="gguf", digest=found.digest, weights_digest=found.weights_digest
    )
