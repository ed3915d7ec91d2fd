"""The environment with Ray, in which the commands run: `make test-ray` makes it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from run.conftest import overrides, reviews, tiny_model  # noqa: F401  (fixtures)

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
WITH_RAY = Path(os.environ.get("TRIETUNE_RAY_PYTHON", ROOT / ".venv-ray/bin/python"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.slow)
        if not WITH_RAY.exists():
            item.add_marker(pytest.mark.skip(reason="no environment with Ray: `make test-ray` sets it up"))
