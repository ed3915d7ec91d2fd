"""Tests of XLA devices, on XLA's own client for the processor; `make test-xla` runs them where torch_xla is installed.

The vendor's habit of making every number a constant of the program is switched on for all of them: it is what tells
one compilation for each shape from one for each step.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("torch_xla") is None:
    collect_ignore_glob = ["test_*"]
else:
    os.environ.setdefault("PJRT_DEVICE", "CPU")


@pytest.fixture(scope="session")
def device():
    """XLA's CPU client, started before anything has computed in this process."""
    from xla.small_training import start

    return start()
