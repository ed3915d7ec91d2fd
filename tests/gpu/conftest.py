"""Tests that need a CUDA card: skipped without one, or run on the CPU under stand-ins for the kernels.

python -m pytest tests/gpu                               on a card
TRIETUNE_STAND_INS=1 python -m pytest tests/gpu          without: checks these tests, not the kernels
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from model.flash_on_cpu import flash_on_cpu
from model.flex_on_cpu import flex_on_cpu

HERE = Path(__file__).parent
HAS_STAND_INS = os.environ.get("TRIETUNE_STAND_INS") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if not HAS_STAND_INS and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA card"))
        elif HAS_STAND_INS and item.get_closest_marker("card") is not None:
            item.add_marker(pytest.mark.skip(reason="asks for the card itself"))


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The card; or the CPU, whose tensors then go through the kernels' stand-ins."""
    with ExitStack() as stack:
        if HAS_STAND_INS:
            stack.enter_context(flash_on_cpu())
            stack.enter_context(flex_on_cpu())
        yield torch.device("cpu" if HAS_STAND_INS else "cuda")
