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
from pathlib import Path
from types import TracebackType

from trietune.errors import UserError
from trietune.io import files, strict_json

LOCK_NAME = ".lock"
_MAX_HOLDER_BYTES = 4096


class RunLock:
    """Hold the run directory as a context manager. Raises `UserError` that names the holder when it is taken.

    Only the program's name is kept of the command line: arguments may carry what nobody else should read.
    """

    def __init__(self, run_directory: Path) -> None:
        self.path = run_directory / LOCK_NAME
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        self._descriptor = _open(self.path)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read_holder(self._descriptor)
            self._close()
            if not isinstance(error, BlockingIOError):
                raise UserError(
                    f"{self.path.parent} cannot be locked ({error.strerror})",
                    next_step="put `project_dir` on a file system that has file locks",
                ) from error
            raise UserError(
                f"another process writes to {self.path.parent}",
                where=holder,
                next_step="wait for it, stop it, or give this run another `wandb_run_name`",
            ) from error
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same, it is only not signed
            files.rewrite_lock(self._descriptor, strict_json.serialise(_this_process()))
        # A forked child shares the lock and would keep it after our death.
        os.register_at_fork(after_in_child=self._close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            files.close(descriptor)


def _open(path: Path) -> int:
    try:
        return files.open_lock(path)
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written to ({error.strerror})",
            where=f"its lock file is {path}",
            next_step="give a `project_dir` that this user may write to",
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
