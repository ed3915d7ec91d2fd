"""The run's folder while the run continues: made, locked, tried, and looked for when it has been moved."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from trietune.checkpoints.lock import LOCK_NAME, RunLock
from trietune.checkpoints.messages import folder_lost
from trietune.checkpoints.probe import check_folder, check_plain_files
from trietune.errors import StopRequested, UserError
from trietune.io.files import make_folders, remove_tree
from trietune.tracking.jsonl import CONFIG, ENVIRONMENT, LINE_FILES

# What a run writes in its folder beside its lines and its checkpoints.
OTHER_FILES = (CONFIG, ENVIRONMENT, ".run-id", "report.html", "wandb.json")


@contextmanager
def locked_folder(directory: Path) -> Iterator[RunLock]:
    """The run's folder, made if need be, locked and tried; what was made for nothing goes again, outer folders too."""
    made = [place for place in (directory, *directory.parents) if not os.path.lexists(place)]
    make_folders(directory)
    with RunLock(directory) as lock:
        try:
            check_plain_files(directory, (*LINE_FILES, *OTHER_FILES))
            check_folder(directory)
            yield lock
        except (UserError, StopRequested):
            if made and lock.is_in_place():
                _remove_if_empty(made)
            raise


def _remove_if_empty(made: Sequence[Path]) -> None:
    directory, *outer = made
    with contextlib.suppress(OSError):
        if {path.name for path in directory.iterdir()} <= {LOCK_NAME}:
            remove_tree(directory)
            for place in outer:
                place.rmdir()


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where the run's folder is now.

    Attributes:
        directory: where it was when the run began.
        lock: None in processes that do not hold it.
    """

    directory: Path
    lock: RunLock | None

    def is_in_place(self) -> bool:
        return self.lock is None or self.lock.is_in_place()

    def find(self) -> tuple[bool, Path | None]:
        """Whether the folder is in its place, and else where it is now, if that can be told."""
        if self.lock is None or self.lock.is_in_place():
            return True, None
        return False, self.lock.moved_to()

    def raise_lost(self, now_at: Path | None) -> NoReturn:
        raise folder_lost(self.directory, now_at)
