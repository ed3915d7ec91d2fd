"""One writer a run directory: a lock that dies with its holder and says who holds it.

The kernel drops the lock when the process ends, however it ends, so nothing is ever left to clean. What the lock file
says about its holder is for people and is believed only while the lock is held.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import time
import weakref
from pathlib import Path
from types import TracebackType

from trietune.errors import UserError
from trietune.io import files, strict_json

LOCK_NAME = ".lock"
_MAX_HOLDER_BYTES = 4096


class RunLock:
    """Hold the run directory as a context manager. Raises `UserError` that names the holder when it is taken.

    Both the lock file and the folder itself are locked, so removing the file lets nobody else in, and moving the folder
    neither. Only the program's name is kept of the command line: arguments may carry what nobody else should read.
    """

    def __init__(self, run_directory: Path) -> None:
        self.directory = run_directory
        self.path = run_directory / LOCK_NAME
        self._descriptor: int | None = None
        self._folder: int | None = None

    def __enter__(self) -> RunLock:
        self._descriptor = _open(self.path)
        try:
            self._folder = files.open_folder(self.directory)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock_folder()
        except OSError as error:
            holder = _read_holder(self._descriptor)
            self._close()
            if not isinstance(error, BlockingIOError):
                raise UserError(
                    f"{self.path.parent} cannot be locked ({error.strerror})",
                    next_step="put `project_dir` on a file system that supports file locks",
                ) from error
            raise UserError(
                f"another process is writing to {self.path.parent}",
                where=holder,
                next_step="wait for it, stop it, or give this run another `wandb_run_name`",
            ) from error
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same, it is only not signed
            files.rewrite_lock(self._descriptor, strict_json.serialize(_this_process()))
        _HELD.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in (self._folder, self._descriptor):
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
        self._close()

    def moved_to(self) -> Path | None:
        """Where the folder is now, if it was moved; None where that cannot be told, or it was removed."""
        if self._folder is None:
            return None
        try:
            place = Path(f"/proc/self/fd/{self._folder}").readlink()
            return place if os.path.samestat(place.stat(), os.fstat(self._folder)) else None
        except OSError:
            return None

    def is_in_place(self) -> bool:
        """Whether the folder's name still means the folder that was locked. A disk that does not answer is in place."""
        if self._folder is None:
            return True
        try:
            return os.path.samestat(self.directory.stat(), os.fstat(self._folder))
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def _lock_folder(self) -> None:
        assert self._folder is not None
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            return  # NFS locks what is open for writing, and no folder is: there the file has to do

    def _close(self) -> None:
        _HELD.discard(self)
        for descriptor in (self._folder, self._descriptor):
            if descriptor is not None:
                files.close(descriptor)
        self._folder = self._descriptor = None


# A forked child shares the locks of its parent and would keep them after the parent's death.
_HELD: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _drop_locks_of_the_parent() -> None:
    for lock in list(_HELD):
        lock._close()


os.register_at_fork(after_in_child=_drop_locks_of_the_parent)


def _open(path: Path) -> int:
    try:
        return files.open_lock(path)
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written to ({error.strerror})",
            where=f"its lock file is {path}",
            next_step="set `project_dir` to a folder that this user can write to",
        ) from error


def _this_process() -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "program": Path(sys.argv[0]).name,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _read_holder(descriptor: int) -> str | None:
    try:
        holder = strict_json.parse(os.pread(descriptor, _MAX_HOLDER_BYTES, 0))
    except (OSError, strict_json.NotStrict):
        return None  # it took the lock a moment ago and has not signed yet
    if not isinstance(holder, dict):
        return None
    host, pid, program, started = (str(holder.get(key))[:200] for key in ("host", "pid", "program", "started"))
    return f"`{program}`, process {pid} on {host}, since {started}"
