"""The folder of what can be made again: tokens, groups, converted models, the sample model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`TRIETUNE_CACHE`, or `trietune` in the user's cache folder; it need not exist."""
    if chosen := environ.get("TRIETUNE_CACHE"):
        return Path(chosen).expanduser()
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "trietune"
