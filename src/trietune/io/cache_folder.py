"""The folder of what can be made again: tokens, groups, converted models, the sample model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from trietune.io.places import expand


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`TRIETUNE_CACHE`, or `trietune` in the user's cache folder; it need not exist.

    Raises `UserError` where there is no home folder.
    """
    if chosen := environ.get("TRIETUNE_CACHE"):
        return expand(chosen)
    return expand(environ.get("XDG_CACHE_HOME") or "~/.cache") / "trietune"
