"""A large file is never in memory a second time: neither when it is saved nor, once restored, when it was read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SIZE_BYTES = 300_000_000
# In a process of its own, whose memory nobody else changes. The peak is that since it was last forgotten.
SCRIPT = """
import json, re, sys
from pathlib import Path
import torch
from trietune.checkpoints.store import CheckpointStore
from trietune.io.safetensors import parse
from trietune.model.adapter import tensors as raw_tensors

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def growth(action):
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    result = action()
    return memory("VmHWM") - before, memory("VmRSS") - before, result

folder, num_numbers, is_streamed = Path(sys.argv[1]), int(sys.argv[2]) // 4, sys.argv[3] == "streamed"
if not is_streamed:
    raw_tensors.STREAMED_ABOVE_BYTES = 2**60
tensors = {"embedding": torch.arange(num_numbers, dtype=torch.float32).view(-1, 1000), "small": torch.ones(3)}
folder.mkdir()
store = CheckpointStore(folder, "run1", 2, 0, "eval/loss", "min")

def save():
    return store.save(1, {"adapter_model.safetensors": raw_tensors.tensors_to_content(tensors)})

def restore(loaded):
    for name, raw in parse(loaded.take("adapter_model.safetensors"))[0].items():
        tensors[name].zero_()
        raw_tensors.copy_into(tensors[name], raw)

save_peak, _, saved = growth(save)
def go_on():
    loaded = store.load("last")
    restore(loaded)
    return loaded
read_peak, read_rest, loaded = growth(go_on)
assert torch.equal(tensors["embedding"].view(-1), torch.arange(num_numbers, dtype=torch.float32))
size = sum(path.stat().st_size for path in saved.path.iterdir())
print(json.dumps({"save": save_peak, "read": read_peak, "left": read_rest, "size": size}))
"""


def measure(folder: Path, how: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(SIZE_BYTES), how], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    assert found["size"] > SIZE_BYTES
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are forgotten only on Linux")
def test_a_large_module_is_saved_and_restored_without_a_second_one_in_memory(tmp_path: Path) -> None:
    found = measure(tmp_path / "a", "streamed")
    assert found["save"] < SIZE_BYTES / 4
    assert found["read"] < 1.25 * SIZE_BYTES, "read more than once, or copied whole"
    assert found["left"] < SIZE_BYTES / 10, "the bytes that were read are still held"
    assert measure(tmp_path / "b", "at once")["save"] > 0.9 * SIZE_BYTES, "this test does not see a copy"
