"""Columns that only later rows bring, which nothing uses.

    {"prompt": "a", "completion": "b"}
    {"prompt": "a", "completion": "b", "note": "x"}      `note`, in row 2

Whoever starts a run hears of the first row's columns; JSON may bring new ones with any row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trietune.data.columns import RowFormat, find_unused
from trietune.data.counts import Count
from trietune.data.opening import BrokenRow
from trietune.data.rows import PlacedRow

LATE_COLUMNS_NAMED = 20


@dataclass(slots=True)
class LateColumns:
    """Collects them over the blocks of a split.

    Attributes:
        known: columns of the first row, and later ones that are used.
        unused: the others, with the rows that hold something there.
    """

    row_format: RowFormat
    known: set[str]
    unused: dict[str, Count] = field(default_factory=dict)

    def add(self, block: Sequence[PlacedRow]) -> None:
        for place, row in block:
            if isinstance(row, BrokenRow) or row.keys() <= self.known:
                continue
            for name in row.keys() - self.known:
                if row[name] is None:
                    continue
                if find_unused((name,), self.row_format) and len(self.unused) < LATE_COLUMNS_NAMED:
                    self.unused.setdefault(name, Count())
                if name in self.unused:
                    self.unused[name] = self.unused[name].plus([place])
                else:
                    self.known.add(name)
