"""What a run left behind, for whoever started it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trietune.errors import EXIT_DONE


@dataclass(frozen=True, slots=True)
class Run:
    """What a run left behind.

    Attributes:
        directory: the run's folder.
        status: `stopped` after a signal or `max_time`.
        step: optimizer steps taken in all.
        before, after: evaluation metrics of the whole validation set; empty where none was measured.
        adapter: folder of the final adapter; None if there is none.
        exit_code: what a command should exit with.
    """

    directory: Path
    status: Literal["finished", "stopped"]
    step: int
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    adapter: Path | None = None
    exit_code: int = EXIT_DONE
