"""Upload an exported folder to a repository of the Hugging Face hub, in one commit: all of it or nothing.

The login is the hub library's own: `HF_TOKEN`, or that of `hf auth login`.
"""

from __future__ import annotations

import re
from pathlib import Path

from trietune.errors import UserError
from trietune.io.causes import first_line

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_STATUS_LOGIN = (401, 403)


def check_repository(name: str, *, where: str) -> None:
    """Raise `UserError` unless `name` is OWNER/NAME."""
    if not _REPOSITORY.fullmatch(name):
        raise UserError(f"`{where} {name}` does not name a repository of the hub", next_step=f"{where} OWNER/NAME")


def push_folder(folder: Path, repository: str, *, is_public: bool = False) -> str:
    """Upload every file of `folder`; returns the page's address.

    Args:
        is_public: whether a new repository is public; one that exists stays as it is.

    Raises:
        UserError: no login, no right to write there, or the hub cannot be reached. Nothing was uploaded then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_repository(repository, where="--push")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in paths]
    hub = HfApi()
    try:
        hub.create_repo(repository, private=not is_public, exist_ok=True)
        hub.create_commit(repository, operations=operations, commit_message="Upload from TrieTune")
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in _STATUS_LOGIN:
            raise UserError(
                f"the hub does not let you write to `{repository}` (HTTP {status})",
                where="your login is HF_TOKEN, or that of `hf auth login`",
                next_step="hf auth login, with a token that may write; or an OWNER that is yours",
            ) from error
        raise UserError(
            f"the hub refused the upload to `{repository}`: {first_line(error)}", next_step="try again later"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"the hub could not be reached for `{repository}`: {first_line(error)}",
            next_step="run the same command to try again",
        ) from error
    return f"{hub.endpoint}/{repository}"
