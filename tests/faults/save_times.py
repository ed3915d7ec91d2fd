"""How long a save of a real adapter takes, and what a background upload costs the steps beside it.

    PYTHONPATH=src python tests/faults/save_times.py [FOLDER]

The adapter has the shapes of rank 4 on all linear layers of Gemma 1.1 2B: 4,902,912 numbers, 19.6 MB in float32,
58.8 MB with Adam's two moments. Saves go through `CheckpointStore` to a real disk, flushes included. A step is a
fixed number of matrix products in one thread. What this does not show: other disks, and steps on a device, beside
which the processor is idle. The last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from trietune.checkpoints import tensors
from trietune.checkpoints.attempts import Patience
from trietune.checkpoints.remote import RemoteRun
from trietune.checkpoints.storage import FolderStorage
from trietune.checkpoints.store import CheckpointStore
from trietune.checkpoints.uploads import Uploader

RANK, LAYERS = 4, 18
LINEAR = {"q": (2048, 2048), "k": (2048, 256), "v": (2048, 256), "o": (2048, 2048), "gate": (2048, 16384),
          "up": (2048, 16384), "down": (16384, 2048)}  # fmt: skip
NUM_SAVES, NUM_STEPS, STEPS_PER_SAVE = 9, 60, 10


def adapter() -> dict[str, np.ndarray]:
    randomness = np.random.default_rng(0)
    arrays = {}
    for layer in range(LAYERS):
        for name, (num_in, num_out) in LINEAR.items():
            arrays[f"layers.{layer}.{name}.lora_A"] = randomness.standard_normal((RANK, num_in), dtype=np.float32)
            arrays[f"layers.{layer}.{name}.lora_B"] = randomness.standard_normal((num_out, RANK), dtype=np.float32)
    return arrays


def contents(arrays: dict[str, np.ndarray], *, with_adam: bool) -> dict[str, bytes]:
    files = {
        "adapter_config.json": b"{}\n",
        "adapter_model.safetensors": tensors.serialise({n: tensors.from_numpy(a) for n, a in arrays.items()}),
    }
    if with_adam:
        moments = {f"{moment}.{n}": tensors.from_numpy(a) for moment in "mv" for n, a in arrays.items()}
        files["optimizer.safetensors"] = tensors.serialise(moments)
    return files


def seconds_of_saves(folder: Path, arrays: dict[str, np.ndarray], *, with_adam: bool) -> list[float]:
    store = CheckpointStore(folder, "run1", 2, 0, "eval/loss", "min")
    seconds = []
    for step in range(1, NUM_SAVES + 1):
        begun = time.perf_counter()
        store.save(step, contents(arrays, with_adam=with_adam))
        seconds.append(time.perf_counter() - begun)
    return seconds[1:]


def seconds_of_steps(folder: Path, arrays: dict[str, np.ndarray], *, with_upload: bool) -> list[float]:
    (folder / "run").mkdir(parents=True)
    store = CheckpointStore(folder / "run", "run1", 2, 0, "eval/loss", "min")
    remote = RemoteRun(FolderStorage(folder / "mirror"), "run", Patience(sleep=lambda s: False))
    uploader = Uploader(store, remote, resumed_step=None)
    if with_upload:
        uploader.start()
    factor, seconds = np.random.default_rng(0).standard_normal((512, 512)), []
    for step in range(1, NUM_STEPS + 1):
        begun = time.perf_counter()
        for _ in range(60):
            factor = factor @ factor
            factor /= np.abs(factor).max()
        seconds.append(time.perf_counter() - begun)
        if step % STEPS_PER_SAVE == 0:
            store.save(step, contents(arrays, with_adam=True))
            uploader.saved()
    if with_upload:
        assert uploader.close(120).is_complete
    return seconds


def main() -> None:
    parent = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    arrays = adapter()
    assert sum(array.size for array in arrays.values()) == 4_902_912
    with tempfile.TemporaryDirectory(dir=parent) as scratch:
        folder = Path(scratch)
        result: dict[str, float] = {}
        for name, with_adam in (("adapter", False), ("adapter_with_adam", True)):
            (folder / name).mkdir()
            seconds = seconds_of_saves(folder / name, arrays, with_adam=with_adam)
            result[f"save_{name}_s"] = statistics.median(seconds)
            result[f"slowest_save_{name}_s"] = max(seconds)
        rounds: dict[bool, list[float]] = {False: [], True: []}
        for number in range(4):  # in turns, so that a machine that gets slower slows both
            with_upload = bool(number % 2)
            rounds[with_upload] += seconds_of_steps(folder / f"steps-{number}", arrays, with_upload=with_upload)
        result["step_without_upload_s"] = statistics.median(rounds[False])
        result["step_with_upload_s"] = statistics.median(rounds[True])
        result["mean_step_without_upload_s"] = statistics.mean(rounds[False])
        result["mean_step_with_upload_s"] = statistics.mean(rounds[True])
    sys.stdout.write(json.dumps({name: round(value, 4) for name, value in result.items()}) + "\n")


if __name__ == "__main__":
    main()
