"""Which cases of a parametrized test wait for `make test-slow`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """All cases, as `parametrize` takes them; those that are not among `fast` are marked slow."""
    found = list(cases)
    assert all(case in found for case in fast), "a case that is to stay does not exist"
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in found]
