"""Models to hand over, and the environment of their readers: `make test-handover` makes both."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
READER = Path(os.environ.get("TRIETUNE_HANDOVER_PYTHON", ROOT / ".venv-handover/bin/python"))

Read = Callable[..., dict[str, Any]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not READER.exists():
        reason = "no environment of readers: `make test-handover` sets it up"
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def read() -> Read:
    """`read("transformers", folder, tokens=[[...]])`: what another program makes of what we wrote."""

    def run(program: str, *arguments: Path, **asked: Any) -> dict[str, Any]:
        done = subprocess.run(
            [READER, HERE / f"read_with_{program}.py", *arguments],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(json.loads(done.stdout))

    return run
