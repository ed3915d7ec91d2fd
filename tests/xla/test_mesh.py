"""Two and four virtual devices, splitting the batch or the weights, give one device's numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LOSS_TOLERANCE = 2e-4


@pytest.mark.parametrize("num_devices", [2, 4])
@pytest.mark.parametrize("kind", ["data", "tensor"])
def test_a_mesh_trains_as_one_device(kind: str, num_devices: int) -> None:
    environ = {**os.environ, "CPU_NUM_DEVICES": str(num_devices), "PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS}"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "xla" / "small_training.py"), kind, str(num_devices)],
        capture_output=True, text=True, env=environ, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(kind, num_devices, found)
    assert found["num_rows"] == (num_devices if kind == "data" else 1)
    assert found["loss_difference"] < LOSS_TOLERANCE
    assert found["last_loss"] < found["first_loss"]
    assert len(set(found["compilations"][10:])) == 1
