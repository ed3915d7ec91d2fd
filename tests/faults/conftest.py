"""Counts of the fault matrix, printed as one table at the end of a run."""

from __future__ import annotations

import pytest
from fault_table import Tally

_ROWS: list[tuple[str, int, int, int]] = []


@pytest.fixture
def tally() -> Tally:
    """`tally("what", tried, survived)`: each test that counts adds one row; what did not survive was lost."""

    def add(what: str, tried: int, survived: int) -> None:
        _ROWS.append((what, tried, survived, tried - survived))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _ROWS:
        return
    width = max(len(row[0]) for row in _ROWS)
    terminalreporter.section("fault matrix")
    terminalreporter.write_line(f"{'fault'.ljust(width)}  {'tried':>7}  {'survived':>8}  {'lost':>5}")
    for what, tried, survived, lost in _ROWS:
        terminalreporter.write_line(f"{what.ljust(width)}  {tried:>7,}  {survived:>8,}  {lost:>5,}")
