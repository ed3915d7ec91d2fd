"""What tests count for the fault matrix: the type of the `tally` fixture, and the table that a run ends with."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

Tally = Callable[[str, int, int], None]
ROW_OF_TABLE = "row of the fault matrix"


def fault_table(reports: Iterable[pytest.TestReport]) -> list[str]:
    """The lines of the table: each `tally` of these tests is a row; no lines if none of them counted."""
    rows = [value for report in reports for name, value in report.user_properties if name == ROW_OF_TABLE]
    if not rows:
        return []
    width = max(len(what) for what, _, _ in rows)
    lines = [f"{'fault'.ljust(width)}  {'tried':>7}  {'survived':>8}  {'lost':>5}"]
    for what, tried, survived in rows:
        lines.append(f"{what.ljust(width)}  {tried:>7,}  {survived:>8,}  {tried - survived:>5,}")
    return lines
