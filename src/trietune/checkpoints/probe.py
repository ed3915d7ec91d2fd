"""Try a run's folder before the first step: what every save does, done once with a few bytes.

Where a folder cannot be renamed, or a rename that was acknowledged did not happen, a run would train to its end and
keep nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from trietune.checkpoints import messages
from trietune.checkpoints.lock import LOCK_NAME
from trietune.errors import UserError
from trietune.io import files

_CONTENT = b"written to see whether this folder keeps what is written\n"


def check_folder(run_directory: Path) -> None:
    """Write a folder with a file, flush, rename, list, read and remove it, in `run_directory` and its `checkpoints`.

    Raises:
        UserError: one of these failed, or what was read is not what was written. Nothing of it stays.
    """
    for folder in (run_directory, run_directory / "checkpoints"):
        if os.path.lexists(folder):
            if not folder.is_dir():
                raise messages.folder_unusable(folder, "it is not a folder")
            _check(folder)


def check_place(run_directory: Path, *, where: str) -> None:
    """Before anything is loaded: make the run's folder as the run will, try it, and remove what was made.

    Args:
        where: `project_dir` comes from.

    Raises:
        UserError: no run could be kept there.
    """
    made: list[Path] = []
    try:
        current = run_directory
        while not current.is_dir() and current != current.parent:
            made.append(current)
            current = current.parent
        files.make_folders(run_directory)
        if not made:
            check_plain_files(run_directory, (LOCK_NAME,))
        check_folder(run_directory)
    except (OSError, ValueError) as error:
        raise messages.place_unusable(run_directory, error, where) from error
    finally:
        files.remove_empty(made)


def check_plain_files(run_directory: Path, names: Sequence[str]) -> None:
    """Raise `UserError` for a link, a folder or a pipe in the place of a file that the run writes."""
    for name in names:
        path = run_directory / name
        try:
            mode = path.lstat().st_mode
        except OSError:
            continue
        if not stat.S_ISREG(mode):
            raise UserError(
                f"{path} is {_kind(mode)}, and a run writes a plain file there",
                where="nothing was changed",
                next_step=f"move it away: `mv {path} {path}.aside`",
            )


def _check(folder: Path) -> None:
    staging = files.hidden_sibling("staging", folder / "probe")
    renamed = files.hidden_sibling("removed", folder / "probe")
    try:
        files.make_folder(staging)
        files.write_file(staging / "file", [_CONTENT])
        files.flush_folder(staging)
        files.rename(staging, renamed)
        files.flush_folder(folder)
        names = [path.name for path in folder.iterdir()]
        if renamed.name not in names or staging.name in names or (renamed / "file").read_bytes() != _CONTENT:
            raise messages.folder_unusable(folder, "a folder that was renamed is not there under its new name")
    except OSError as error:
        raise messages.folder_unusable(folder, error.strerror or str(error), error.errno or 0) from error
    finally:
        files.discard(staging)
        files.discard(renamed)


def _kind(mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "a link"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
