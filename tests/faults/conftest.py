"""Counts of the fault matrix; `tests/conftest.py` prints them as one table at the end of a run."""

from __future__ import annotations

import pytest

from fault_table import ROW_OF_TABLE, Tally


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """`tally("what", tried, survived)`: each test that counts adds one row; what did not survive was lost."""
    properties = request.node.user_properties  # they travel with the test's report to the process that prints

    def add(what: str, tried: int, survived: int) -> None:
        properties.append((ROW_OF_TABLE, (what, tried, survived)))

    return add
