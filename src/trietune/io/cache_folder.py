"""The folder of what can be made again: tokens, groups, converted models, the sample model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from trietune.io.places import expand


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`TRIETUNE_CACHE`, or `trietune` in the user's cache folder; it need not exist."""
    if chosen := environ.get("TRIETUNE_CACHE"):
        return expand(chosen)
    return expand(environ.get("XDG_CACHE_HOME") or "~/.cache") / "trietune"


def mark_used(entry: Path) -> None:
    """Remember that an entry of the cache was of use now: `trietune cache --prune` goes by its time."""
    with contextlib.suppress(OSError):
        os.utime(entry)
