"""Files that a person asked a command to write: new ones, or plain files that are replaced as a whole.

A link or a device would not be written to but replaced, by root even `/dev/null`; so neither is taken.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from trietune.errors import UserError
from trietune.io import files


def check_output(path: Path, name: str) -> None:
    """Raise `UserError` unless a file can be put at `path`.

    Args:
        name: the option, or what is to be written, for the message.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise UserError(
                f"`{name}`: there is no folder `{path.parent}`", next_step=f"mkdir -p {path.parent}"
            ) from None
        return
    except OSError as error:
        raise UserError(f"`{name}`: `{path}` cannot be written: {error.strerror}") from error
    if stat.S_ISREG(mode):
        return
    kind = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "no plain file"
    target = f" to {path.readlink()}" if stat.S_ISLNK(mode) else ""
    raise UserError(
        f"`{name}`: `{path}` is {kind}{target}, and would be replaced by a file",
        next_step="name a new file or a plain one; `--output -` and `--out -` write to standard output",
    )


def write_output(path: Path, data: bytes, name: str) -> None:
    """Put `data` at `path`, whole or not at all. Raises `UserError` if it cannot be put there."""
    check_output(path, name)
    try:
        files.replace_file(path, data)
    except OSError as error:
        raise UserError(
            f"`{name}`: `{path}` could not be written: {error.strerror or error}",
            next_step="free some space there, or name a file in a folder of your own",
        ) from error
