"""Data sets of the Hugging Face hub, through `datasets`, with errors for people."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from trietune.data.recipes import TaskName
from trietune.errors import UserError


class _Place(NamedTuple):
    path: str
    config: str | None


# SST-2 lies in two places with the same rows; one of them may be in the cache of a machine without network.
_SST2_PLACES = (_Place("stanfordnlp/sst2", None), _Place("nyu-mll/glue", "sst2"))
_SQUAD_PLACES = (_Place("rajpurkar/squad_v2", None),)
_ALIASES: dict[str, TaskName] = {
    "stanfordnlp/sst2": "sst2",
    "sst2": "sst2",
    "glue/sst2": "sst2",
    "nyu-mll/glue": "sst2",
    "squadv2": "squad",
    "squad_v2": "squad",
    "rajpurkar/squad_v2": "squad",
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?(@[\w./-]+)?")


def find_task(dataset_id: str) -> TaskName | None:
    """The task that a data set's name stands for, if it is one of those that are built in."""
    return _ALIASES.get(dataset_id.lower().split("@")[0])


def suggest_alias(dataset_id: str) -> str | None:
    """The built-in name that a misspelt one may have meant."""
    near = get_close_matches(dataset_id.lower().replace("-", ""), _ALIASES, n=1, cutoff=0.75)
    return near[0] if near else None


def is_hub_id(dataset_id: str) -> bool:
    """Whether this could be a hub id: `name`, `owner/name`, with `:configuration` and `@revision` behind it."""
    return _HUB_ID.fullmatch(dataset_id) is not None


def load_from_hub(dataset_id: str) -> tuple[Any, str]:
    """All splits of a data set (a `datasets.DatasetDict`), and the name that it was found under.

    Raises:
        UserError: not found, gated, not reachable, not in the cache while offline, or several configurations.
    """
    name, _, revision = dataset_id.partition("@")
    errors: list[UserError] = []
    for place in _places(name):
        try:
            splits = _load(place, revision or None, dataset_id)
        except UserError as error:
            errors.append(error)
        else:
            return splits, place.path if place.config is None else f"{place.path} ({place.config})"
    raise errors[0]


def _places(name: str) -> Sequence[_Place]:
    match find_task(name):
        case "sst2":
            return _SST2_PLACES[::-1] if "glue" in name.lower() else _SST2_PLACES
        case "squad":
            return _SQUAD_PLACES
    path, _, config = name.partition(":")
    return [_Place(path, config or None)]


def _load(place: _Place, revision: str | None, dataset_id: str) -> Any:
    import datasets

    shows_progress = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(place.path, place.config, revision=revision)
    except Exception as error:  # the library's errors, the hub's and the network's have no common base
        raise _explain(error, place.path, dataset_id) from error
    finally:
        if shows_progress:
            datasets.enable_progress_bars()


def _explain(error: Exception, path: str, dataset_id: str) -> UserError:
    """What a person can do about it. Wordings of the libraries are matched by their stable parts."""
    chain = _chain(error)
    names = {type(one).__name__ for one in chain}
    text = " ".join(str(one) for one in chain)
    where = f"dataset_id: {dataset_id}"
    local = "`train_file` and `validation_file` take local files"
    if names & {"GatedRepoError"} or "gated dataset" in text:
        return UserError(
            f"`{path}` is gated: its owner wants you to agree to terms first",
            where=where,
            next_step=f"open https://huggingface.co/datasets/{path}, accept, then `hf auth login` or set HF_TOKEN",
        )
    if "OfflineModeIsEnabled" in names or (
        _is_offline() and names & {"ConnectionError", "ValueError", "FileNotFoundError"}
    ):
        return UserError(
            f"`{path}` is not in the cache of this machine, and offline mode is on",
            where=f"{where}; {_offline_variable()} is set",
            next_step=f"run once without it, or {local}",
        )
    if "RevisionNotFoundError" in names:
        return UserError(f"`{path}` has no such revision", where=where, next_step="leave `@...` out for the newest one")
    if "Config name is missing" in text or "BuilderConfig" in text:
        listed = re.search(r"\[.*?\]", text, re.DOTALL)
        configs = re.findall(r"'([^']+)'", listed.group()) if listed else []
        return UserError(
            f"`{path}` has several configurations, and one must be named",
            where=where,
            next_step=f"dataset_id: {path}:{configs[0]}     (of {', '.join(configs[:8])})"
            if configs
            else f"dataset_id: {path}:CONFIGURATION",
        )
    if "Dataset scripts are no longer supported" in text:
        return UserError(
            f"`{path}` is a program and not data, and programs from the hub are not run",
            where=where,
            next_step=f"look for a version of it in parquet; {local}",
        )
    if names & {"DatasetNotFoundError", "RepositoryNotFoundError"}:
        near = suggest_alias(dataset_id)
        return UserError(
            f"there is no data set `{path}` on the hub, or it is private",
            where=where,
            next_step=f"did you mean `{near}`?" if near else f"check the name; for a private one set HF_TOKEN; {local}",
        )
    if "DataFilesNotFoundError" in names or "EmptyDatasetError" in names:
        return UserError(f"`{path}` holds no data files that can be read", where=where, next_step=local)
    if any("Connect" in name or "Timeout" in name or name == "LocalEntryNotFoundError" for name in names):
        return UserError(
            f"the hub cannot be reached, and `{path}` is not in the cache of this machine",
            where=where,
            next_step=f"check the network or its proxy (HTTPS_PROXY), or {local}",
        )
    reason = next(iter(str(error).strip().splitlines()), "no reason given")
    return UserError(
        f"`{path}` cannot be loaded: {type(error).__name__}: {reason}",
        where=where,
        next_step=local,
    )


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def _offline_variable() -> str:
    return "HF_DATASETS_OFFLINE" if "HF_DATASETS_OFFLINE" in os.environ else "HF_HUB_OFFLINE"


def _is_offline() -> bool:
    import datasets

    return bool(datasets.config.HF_HUB_OFFLINE)
