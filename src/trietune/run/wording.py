"""Lists in sentences."""

from __future__ import annotations

from collections.abc import Sequence


def few(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
