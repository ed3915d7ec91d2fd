"""Data sets of the Hugging Face hub, through `datasets`, with errors for people."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NamedTuple

from trietune.data.columns import TaskName
from trietune.demo.locations import DEMO_QUESTIONS, DEMO_REVIEWS
from trietune.errors import UserError
from trietune.io.causes import causes


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
    "nyu-mll/glue:sst2": "sst2",
    "glue:sst2": "sst2",
    "squadv2": "squad",
    "squad_v2": "squad",
    "rajpurkar/squad_v2": "squad",
}
# Data in the form of a built-in task that lies elsewhere and is loaded from there.
_SAME_FORM: dict[str, TaskName] = {
    "squad": "squad",
    "rajpurkar/squad": "squad",
    DEMO_REVIEWS: "sst2",
    DEMO_QUESTIONS: "squad",
}
# A hub that answers at all does so in a second or two.
HUB_TIMEOUT_S = 10.0
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?(@[\w./-]+)?")


def find_task(dataset_id: str) -> TaskName | None:
    """The task that a data set's name stands for, if it is one of those that are built in."""
    name = dataset_id.lower().split("@")[0]
    return _ALIASES.get(name) or _SAME_FORM.get(name)


def suggest_alias(dataset_id: str) -> str | None:
    """The built-in name that a misspelt one may have meant."""
    near = get_close_matches(dataset_id.lower().replace("-", ""), _ALIASES, n=1, cutoff=0.75)
    return near[0] if near else None


def is_hub_id(dataset_id: str) -> bool:
    """Whether this could be a hub id: `name`, `owner/name`, with `:configuration` and `@revision` behind it."""
    return _HUB_ID.fullmatch(dataset_id) is not None


def load_from_hub(dataset_id: str, *, report: Callable[[str], None]) -> tuple[Any, str]:
    """All splits of a data set (a `datasets.DatasetDict`), and the name that it was found under.

    What is in the cache of the machine is used when the hub cannot be reached, and `report` takes a line that says so.

    Raises:
        UserError: not found, gated, not reachable, not in the cache while offline, or several configurations.
    """
    name, _, revision = dataset_id.partition("@")
    errors: list[UserError] = []
    for place in _places(name):
        try:
            splits = _load(place, revision or None, dataset_id, report)
        except UserError as error:
            errors.append(error)
        else:
            return splits, place.path if place.config is None else f"{place.path} ({place.config})"
    raise errors[0]


def _places(name: str) -> Sequence[_Place]:
    match _ALIASES.get(name.lower()):
        case "sst2":
            return _SST2_PLACES[::-1] if "glue" in name.lower() else _SST2_PLACES
        case "squad":
            return _SQUAD_PLACES
    path, _, config = name.partition(":")
    return [_Place(path, config or None)]


def _load(place: _Place, revision: str | None, dataset_id: str, report: Callable[[str], None]) -> object:
    import datasets

    unreachable: Exception | None = None
    try:
        if not _is_offline():
            unreachable = _find_out_whether_unreachable(place.path, revision)
        with _quiet(), _offline(unreachable is not None):
            splits = datasets.load_dataset(place.path, place.config, revision=revision)
    except Exception as error:  # datasets' errors, the hub's and the network's have no common base
        raise _explain(unreachable or error, place.path, dataset_id) from error
    if unreachable is not None:
        report(f"the hub cannot be reached: `{place.path}` comes from the cache of this machine")
    return splits


def _find_out_whether_unreachable(path: str, revision: str | None) -> Exception | None:
    """The network's error, or None. Asked first: `datasets` itself would try six times, for half a minute, aloud.

    Raises:
        Exception: the hub was reached, and refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(path, revision=revision, timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code >= 500:
            return error
        raise
    except Exception as error:
        if _is_network_error(error):
            return error
        raise
    return None


@contextmanager
def _offline(is_wanted: bool) -> Iterator[None]:
    """Both libraries read these flags at each request; there is no argument for it."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if is_wanted:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and warnings of `datasets`: the console is not its to write on."""
    import datasets

    shows_progress, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shows_progress:
            datasets.enable_progress_bars()


def _explain(error: Exception, path: str, dataset_id: str) -> UserError:
    """What a person can do about it. Wordings of the libraries are matched by their stable parts."""
    chain = list(causes(error))
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
            f"`{path}` is a script, not data, and scripts from the hub are not run",
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
    if any(_is_network_error(one) for one in chain) or "LocalEntryNotFoundError" in names:
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


def _is_network_error(error: BaseException) -> bool:
    # By name: which HTTP library the hub's client uses is its own affair, and has changed before.
    name = type(error).__name__
    is_server_error = name == "HfHubHTTPError"
    return is_server_error or any(part in name for part in ("Connect", "Timeout", "NetworkError", "ProxyError"))


def _offline_variable() -> str:
    return "HF_DATASETS_OFFLINE" if "HF_DATASETS_OFFLINE" in os.environ else "HF_HUB_OFFLINE"


def _is_offline() -> bool:
    import datasets

    return bool(datasets.config.HF_HUB_OFFLINE)
