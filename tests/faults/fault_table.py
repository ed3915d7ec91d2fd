"""The type of the `tally` fixture; see `conftest.py`."""

from __future__ import annotations

from collections.abc import Callable

Tally = Callable[[str, int, int], None]
