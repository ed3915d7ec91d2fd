"""A folder that is whole or absent: written beside its final name, flushed, renamed once.

Used for what this machine can make again (converted weights) and for what a user asks for (exports).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from trietune.errors import UserError
from trietune.io import files

_STAGING = re.compile(r"\..+\.staging-(?P<pid>[0-9]{1,9})")


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Give an empty folder to fill; when the block ends well it becomes `final`, otherwise nothing remains.

    If another process made `final` meanwhile, that one stays and ours is dropped: callers write what depends on the
    name alone, or have checked that `final` is free.

    Raises:
        UserError: the disk is full, read-only, or the place may not be written.
    """
    staging = final.with_name(f".{final.name}.staging-{os.getpid()}")
    held: int | None = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(final.parent)
        # Left by a process that died and whose number we were given: no other process can carry ours.
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        held = _hold(staging)
        yield staging
        _let_others_read(staging)
        _flush(staging)
        try:
            staging.rename(final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        files.flush_folder(final.parent)
    except OSError as error:
        raise write_error(error, final) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if held is not None:
            files.close(held)


def _hold(staging: Path) -> int | None:
    """Lock the folder while it is filled: the lock goes with its writer, however that ends. None without such locks."""
    descriptor = files.open_folder(staging)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        files.close(descriptor)
        return None
    return descriptor


def _remove_left(folder: Path) -> None:
    """Remove what killed writers left in `folder`: theirs are the names, no process has their number, no lock holds.

    On a disk that several machines share, a number says nothing and the lock does; where there are no locks, nothing
    is removed.
    """
    for path in folder.glob(".*.staging-*"):
        number = _STAGING.fullmatch(path.name)
        if number is None or path.is_symlink() or not path.is_dir() or psutil.pid_exists(int(number["pid"])):
            continue
        with contextlib.suppress(OSError):
            held = files.open_folder(path)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                files.close(held)


def write_error(error: OSError, place: Path) -> Exception:
    """The `UserError` for a failed write to `place`, or `error` itself if no user could mend it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk is full: `{place}` could not be written",
            where=f"{_free_bytes(place):,} bytes are free there",
            next_step="free some space or choose another place, then run the same command again",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(
            f"`{place}` may not be written: {os.strerror(error.errno or 0).lower()}",
            next_step="choose a folder of your own, or make this one writable",
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UserError(f"`{place}` cannot be a folder: a file has that name, or a part of it")
    return error


def _let_others_read(folder: Path) -> None:
    """Give every file the mode that this user's umask gives; safetensors writes 0600 (its issue 782)."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _flush(folder: Path) -> None:
    paths = sorted(folder.rglob("*"))
    for path in paths:
        if path.is_file():
            files.flush_file(path)
    for inner in [*(path for path in paths if path.is_dir()), folder]:
        files.flush_folder(inner)


def _free_bytes(place: Path) -> int:
    existing = next(parent for parent in [place, *place.absolute().parents] if parent.exists())
    return shutil.disk_usage(existing).free
