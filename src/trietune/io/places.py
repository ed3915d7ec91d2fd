"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path

from trietune.errors import UserError


def expand(path: str | Path) -> Path:
    """`path` with `~` and `~name` as home folders. Raises `UserError` where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        first = Path(path).parts[0]
        raise UserError(
            f"`{path}`: `{first}` stands for no home folder here",
            where="its user is unknown" if first != "~" else "HOME is not set, and this user has none",
            next_step="write the whole path" if first != "~" else "write the whole path, or set HOME",
        ) from None


def real_path(path: Path) -> Path:
    """Where `path` leads when all links are followed; links in a circle stay as they are, where `resolve` raises."""
    return Path(os.path.realpath(path))
