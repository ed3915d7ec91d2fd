"""Fetch a base model from the hub: only data files, and each way to fail with its own next step.

`HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what they mean everywhere, because the hub's own library
does the work. Its exceptions come from `huggingface_hub.errors`; the HTTP library below it changed between versions.
"""

from __future__ import annotations

import difflib
import errno
import io
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from trietune.errors import UserError
from trietune.io.causes import causes
from trietune.model.base.folder import TOKENIZER_FILES, Progress, Report, check_names

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

WANTED_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    *TOKENIZER_FILES,
    "README.md",
)
# Weights in other layouts beside the ones that are loaded, each as large as the model: `original/`, `onnx/`, Mistral's.
UNWANTED_FILES = ("*/*", "consolidated*.safetensors")

# Suggested for a misspelt id. The families that the trie's attention is tested with, in the sizes that people tune.
WELL_KNOWN = (
    "google/gemma-2b",
    "google/gemma-2b-it",
    "google/gemma-7b",
    "google/gemma-1.1-2b-it",
    "google/gemma-1.1-7b-it",
    "google/gemma-2-2b",
    "google/gemma-2-2b-it",
    "google/gemma-2-9b-it",
    "google/gemma-3-270m-it",
    "google/gemma-3-1b-pt",
    "google/gemma-3-1b-it",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-3B-Instruct",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "Qwen/Qwen3-4B",
    "mistralai/Mistral-7B-v0.3",
    "mistralai/Mistral-7B-Instruct-v0.3",
    "HuggingFaceTB/SmolLM2-135M",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolLM2-360M-Instruct",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct",
)


def fetch(repo: str, revision: str | None, *, token: str | None, report: Report, progress: Progress) -> Path:
    """The folder of one commit in the hub's cache, fetched as far as it is not there.

    If the hub cannot be asked, a copy of this revision on the disk is taken, and `report` says so.

    Raises:
        UserError: gated, missing, misspelt, no such revision, offline, no network, hub in trouble, disk full, or a
            repository without safetensors.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # re-exported

    shown = f"{repo}@{revision}" if revision else repo
    reachable = True
    try:
        info = HfApi(token=token).model_info(repo, revision=revision, files_metadata=True)
        names = [file.rfilename for file in info.siblings or ()]
        check_names(shown, names)
        _check_space(shown, info)
    except HFValidationError as error:
        raise UserError(f"`model_name: {repo}` is not a hub id: {error}", next_step=_suggest(repo)) from error
    except (HTTPError, OSError) as error:
        # Whatever keeps us from asking, a copy of this very revision on the disk serves as well.
        reachable = False
        reason = error

    try:
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                token=token,
                allow_patterns=list(WANTED_FILES),
                ignore_patterns=list(UNWANTED_FILES),
                local_files_only=not reachable,
                tqdm_class=_reporting_bar(f"fetching {shown}", progress),
                library_name="trietune",
            )
        )
    except (HTTPError, OSError) as error:
        _explain(repo, revision, error if reachable else reason)
    if not reachable:
        report(f"{_why_unreachable(reason)}; using the copy of {shown} on this disk, commit {folder.name[:12]}")
    return folder


def fetch_config(repo: str, revision: str | None, *, token: str | None = None) -> bytes:
    """The content of a repository's `config.json`, and nothing else of it; from the cache if the hub cannot be asked.

    Raises:
        UserError: as `fetch`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # re-exported

    try:
        return Path(hf_hub_download(repo, "config.json", revision=revision, token=token)).read_bytes()
    except HFValidationError as error:
        raise UserError(f"`{repo}` is not a hub id: {error}", next_step=_suggest(repo)) from error
    except (HTTPError, OSError) as error:
        _explain(repo, revision, error)


def _check_space(shown: str, info: ModelInfo) -> None:
    """Say that the disk is too small before gigabytes have been fetched for nothing."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    if (cache / f"models--{info.id.replace('/', '--')}" / "snapshots" / str(info.sha)).is_dir():
        return
    wanted = [file.size or 0 for file in info.siblings or () if _is_wanted(file.rfilename)]
    existing = next(parent for parent in [cache, *cache.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if sum(wanted) > free:
        raise UserError(
            f"`{shown}` needs {_gigabytes(sum(wanted))} of disk, and {_gigabytes(free)} are free",
            where=f"in {cache}",
            next_step="free some space, or set HF_HOME to a folder on a larger disk",
        )


def _is_wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in WANTED_FILES) and not any(
        fnmatch(name, pattern) for pattern in UNWANTED_FILES
    )


def _explain(repo: str, revision: str | None, error: Exception) -> NoReturn:
    """Turn what the hub's library raised into what the user can do about it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    shown = f"{repo}@{revision}" if revision else repo
    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        raise UserError(
            f"`{shown}` is not on this disk, and HF_HUB_OFFLINE prevents downloading it",
            next_step=f"unset HF_HUB_OFFLINE, or download it elsewhere with `hf download {repo}` and copy HF_HOME here",
        ) from error
    if isinstance(error, GatedRepoError):
        raise UserError(
            f"`{repo}` is gated: its owner asks you to accept the terms first",
            where=f"at {_page(repo)}" + ("" if _has_token() else "; no token was sent, HF_TOKEN is not set"),
            next_step="accept them there, logged in; then `hf auth login`, or set HF_TOKEN to a token that may read it",
        ) from error
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        if _has_token() and status == 401:
            raise UserError(
                f"the hub does not accept the token that was sent for `{repo}`, or there is no such model",
                where="the token is HF_TOKEN if that is set, else the one of `hf auth login`",
                next_step=f"`hf auth whoami` shows whether the token works; {_suggest(repo)}",
            ) from error
        raise UserError(
            f"the hub has no model `{repo}`, or it is private and the token may not read it",
            where=None if _has_token() else "no token was sent: HF_TOKEN is not set",
            next_step=_suggest(repo),
        ) from error
    if isinstance(error, RevisionNotFoundError):
        raise UserError(
            f"`{repo}` has no revision `{revision}`",
            where=f"branches, tags and commits: {_page(repo)}/commits/main",
            next_step=f"`model_name: {repo}` takes the newest",
        ) from error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        from huggingface_hub.constants import HF_HUB_CACHE

        raise UserError(
            f"the disk filled up while `{shown}` was being downloaded",
            where=f"in {HF_HUB_CACHE}",
            next_step="free some space, or set HF_HOME to a folder on a larger disk; what is there already is kept",
        ) from error
    if isinstance(error, PermissionError):
        raise UserError(
            f"the hub's cache cannot be written: `{error.filename}`",
            next_step="set HF_HOME to a folder of your own",
        ) from error
    if status is not None:
        retry = status >= 500 or status == 429
        raise UserError(
            f"the hub answered {status} for `{shown}`, and there is no copy of it on this disk",
            where=_endpoint(),
            next_step="try again in a few minutes" if retry else f"open {_page(repo)} in a browser to see why",
        ) from error
    if isinstance(error, LocalEntryNotFoundError) or type(error).__module__.split(".")[0] in ("httpx", "httpx2"):
        raise UserError(
            f"`{shown}` is not on this disk, and {_why_unreachable(error)}",
            where=_endpoint(),
            next_step="check the network (HF_ENDPOINT and proxy variables too), or give a folder as `model_name`",
        ) from error
    raise error


def _why_unreachable(error: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if (status := _status(error)) is not None:
        return f"the hub answered {status}"
    return "the hub cannot be reached"


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of huggingface_hub, which wraps some in others."""
    responses = (getattr(link, "response", None) for link in causes(error))
    return next((int(response.status_code) for response in responses if response is not None), None)


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _page(repo: str) -> str:
    return f"{_endpoint()}/{repo}"


def _suggest(repo: str) -> str:
    """The nearest of the well-known ids; the name counts more than the owner."""
    by_name = {known.rpartition("/")[2].lower(): known for known in WELL_KNOWN}
    by_id = {known.lower(): known for known in WELL_KNOWN}
    near = difflib.get_close_matches(repo.lower(), by_id, n=1, cutoff=0.8)
    if near:
        return f"did you mean `{by_id[near[0]]}`?"
    near = difflib.get_close_matches(repo.rpartition("/")[2].lower(), by_name, n=1, cutoff=0.75)
    if near:
        return f"did you mean `{by_name[near[0]]}`?"
    return "check the spelling (owner/name, as in the address of its page); if it is private, set HF_TOKEN"


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"


def _reporting_bar(phase: str, progress: Progress) -> type[object]:
    """A bar that draws nothing and tells `progress` how many bytes have come."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # re-exported

    class ReportingBar(tqdm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO(), "leave": False})  # type: ignore[no-untyped-call]

        def display(self, *args: object, **kwargs: object) -> None:
            if self.unit == "B":
                progress(phase, int(self.n), int(self.total) if self.total else None)

    return ReportingBar
