"""One pool of processes for all tests of several ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ranks.pool import Pool
from run.conftest import overrides, questions, reviews, tiny_model  # noqa: F401  (fixtures)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    made = Pool()
    yield made
    made.close()
