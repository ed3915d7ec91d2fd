"""What a person reads when the disk refuses: the file, its folder, and what helps against that errno."""

from __future__ import annotations

import errno
from pathlib import Path

from trietune.errors import UserError

REMEDIES = {
    errno.ENOSPC: "free some space on that disk; `keep_last_n` and `keep_best_n` limit what a run keeps",
    errno.EDQUOT: "free some of your quota there; `keep_last_n` and `keep_best_n` limit what a run keeps",
    errno.EFBIG: "raise the limit of file sizes (`ulimit -f unlimited`)",
    errno.EMFILE: "raise the limit of open files (`ulimit -n 4096`)",
    errno.EACCES: "give this user permission to write there",
    errno.EPERM: "give this user permission to write there",
    errno.EROFS: "the file system went read-only: look into its log (`dmesg`), then mount it again",
    errno.EIO: "the disk failed to keep the bytes: look into its log (`dmesg`) before you trust it again",
}


class SaveFailed(UserError):  # noqa: N818  (an event that a run survives)
    """A save that the disk refused; what was saved before is as it was. `number` is the errno."""

    def __init__(self, what: str, *, where: str, next_step: str, number: int) -> None:
        super().__init__(what, where=where, next_step=next_step)
        self.number = number


def save_failed(error: OSError, target: Path) -> SaveFailed:
    """`target` could not be written; whether that matters is the caller's business."""
    return SaveFailed(
        f"{target.name} was not saved: {error.strerror or error}",
        where=f"in {target.parent}",
        next_step=REMEDIES.get(error.errno or 0, "check that folder and its disk"),
        number=error.errno or 0,
    )


def start_failed(error: OSError, path: Path) -> UserError:
    """A file of the run directory could not be written before the first step."""
    return UserError(
        f"{path.name} could not be written: {error.strerror or error}",
        where=f"in {path.parent}; nothing was lost",
        next_step=REMEDIES.get(error.errno or 0, "check that folder and its disk"),
    )
