"""How long saves take, and what they cost training: beside steps, in the background, and after a signal.

    PYTHONPATH=src python tests/faults/save_times.py [--folder FOLDER] [--model MODEL] [--set KEY=VALUE ...]

Two parts. The first saves an adapter with the shapes of rank 4 on all linear layers of Gemma 1.1 2B (4,902,912
numbers, 19.6 MB in float32, 58.8 MB with Adam's two moments) through `CheckpointStore` to a real disk, flushes
included, and copies it to a folder in the background beside a fixed number of matrix products in one thread.

The second trains on the sample data with `--model` (default: the sample model) and saves every ten steps, in turns with
and without copies; three more runs are stopped by SIGTERM. `gemma_save_..._share_of_a_step` set the first part's saves
against the second part's step. What this does not show: other disks, real networks, and steps on a device, beside which
the processor is idle. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from trietune import load_config, train
from trietune.checkpoints.remote.copies import RemoteRun
from trietune.checkpoints.remote.retry import RetryPolicy
from trietune.checkpoints.remote.storage import FolderStorage
from trietune.checkpoints.remote.uploads import Uploader
from trietune.checkpoints.store import CheckpointStore
from trietune.demo import demo_config
from trietune.io import safetensors as tensors
from trietune.io.directory import verify_directory
from trietune.tracking.events import Event, Saved, StepFinished
from trietune.tracking.jsonl import FilesListener
from trietune.tracking.tracker import Tracker

RANK, LAYERS = 4, 18
LINEAR = {"q": (2048, 2048), "k": (2048, 256), "v": (2048, 256), "o": (2048, 2048), "gate": (2048, 16384),
          "up": (2048, 16384), "down": (16384, 2048)}  # fmt: skip
NUM_SAVES, NUM_STEPS, STEPS_PER_SAVE = 9, 60, 10
NUM_REAL_STEPS, WARM_UP_STEPS = 50, 5


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
        "adapter_model.safetensors": tensors.serialize({n: tensors.from_numpy(a) for n, a in arrays.items()}),
    }
    if with_adam:
        moments = {f"{moment}.{n}": tensors.from_numpy(a) for moment in "mv" for n, a in arrays.items()}
        files["optimizer.safetensors"] = tensors.serialize(moments)
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
    remote = RemoteRun(FolderStorage(folder / "mirror"), "run", RetryPolicy(sleep=lambda s: False))
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


def settings_of(project: Path, model: str, **changes: Any) -> dict[str, Any]:
    return {
        "model_name": model, "project_dir": str(project), "wandb_run_name": "run", "save_strategy": "step",
        "steps_freq": STEPS_PER_SAVE, "save_optim": True, "keep_last_n": 2, "keep_best_n": 0, "val_steps_freq": 10**6,
        "eval_max_examples": 1, "print_examples": False, "self_check": False, "num_epochs": 1000, "use_wandb": False,
        **changes,
    }  # fmt: skip


def as_written(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


class Watch:
    """Notes how long each step and each save of a run took."""

    name = "watch"

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.after_saves: list[float] = []
        self.saves: list[float] = []

    def handle(self, event: Event) -> None:
        if isinstance(event, StepFinished) and event.step > WARM_UP_STEPS:
            seconds = len(event.example_ids) / event.metrics["examples_per_second"]
            self.steps.append(seconds)
            if event.step % STEPS_PER_SAVE == 1:
                self.after_saves.append(seconds)
        if isinstance(event, Saved) and event.kind == "checkpoint":
            self.saves.append(event.seconds)

    def close(self) -> None:
        return


def watch_training(project: Path, model: str, overrides: list[str], **changes: Any) -> Watch:
    """A real run of `NUM_REAL_STEPS` steps."""
    written = as_written(settings_of(project, model, max_steps=NUM_REAL_STEPS, **changes))
    watch = Watch()
    tracker = Tracker([watch])
    tracker.add(FilesListener())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert train(load_config(demo_config(), [*written, *overrides]), tracker=tracker).status == "finished"
    return watch


def seconds_after_sigterm(project: Path, model: str, overrides: list[str], moment: float) -> tuple[float, float]:
    """From SIGTERM, `moment` seconds after a step, to a whole checkpoint of the last step, and to the end."""
    written = [*as_written(settings_of(project, model, steps_freq=10**6)), *overrides]
    parts = [part for text in written for part in ("--set", text)]
    process = subprocess.Popen(
        [sys.executable, "-m", "trietune", "train", *parts], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    run = project / "run"
    batches = run / "batches.jsonl"
    while not batches.exists() or batches.read_bytes().count(b"\n") < WARM_UP_STEPS:
        if process.poll() is not None:
            raise RuntimeError(f"`trietune train {' '.join(parts)}` ended with {process.returncode}")
        time.sleep(0.01)
    time.sleep(moment)
    begun = time.perf_counter()
    os.kill(process.pid, signal.SIGTERM)
    while not list(run.glob("checkpoints/step-*")) and process.poll() is None:
        time.sleep(0.002)
    saved = time.perf_counter() - begun
    process.wait()
    ended = time.perf_counter() - begun
    [checkpoint] = run.glob("checkpoints/step-*")
    verify_directory(checkpoint)
    return saved, ended


def measure_saves(folder: Path) -> dict[str, float]:
    arrays = adapter()
    assert sum(array.size for array in arrays.values()) == 4_902_912
    result: dict[str, float] = {}
    for name, with_adam in (("adapter", False), ("adapter_with_adam", True)):
        (folder / name).mkdir()
        seconds = seconds_of_saves(folder / name, arrays, with_adam=with_adam)
        result[f"gemma_save_{name}_s"] = statistics.median(seconds)
        result[f"gemma_slowest_save_{name}_s"] = max(seconds)
    rounds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(4):  # in turns, so that a machine that gets slower slows both
        with_upload = bool(number % 2)
        rounds[with_upload] += seconds_of_steps(folder / f"steps-{number}", arrays, with_upload=with_upload)
    for with_upload, word in ((False, "without"), (True, "with")):
        result[f"products_{word}_upload_s"] = statistics.median(rounds[with_upload])
        result[f"mean_products_{word}_upload_s"] = statistics.mean(rounds[with_upload])
    return result


def measure_training(folder: Path, model: str, overrides: list[str]) -> dict[str, float]:
    steps: dict[bool, list[float]] = {False: [], True: []}
    after_saves: dict[bool, list[float]] = {False: [], True: []}
    saves: list[float] = []
    for number in range(4):
        with_upload = bool(number % 2)
        storage = {"storage_backend": "local", "remote_path": str(folder / f"mirror-{number}")} if with_upload else {}
        found = watch_training(folder / f"run-{number}", model, overrides, sync_to_storage=with_upload, **storage)
        steps[with_upload] += found.steps
        # Against its own run's steps, so that a machine that gets slower between runs changes nothing.
        after_saves[with_upload] += [seconds / statistics.median(found.steps) for seconds in found.after_saves]
        saves += found.saves
    result = {}
    for with_upload, word in ((False, "without"), (True, "with")):
        result[f"step_{word}_upload_s"] = statistics.median(steps[with_upload])
        result[f"mean_step_{word}_upload_s"] = statistics.mean(steps[with_upload])
    step_s = result["step_without_upload_s"]
    with_copy, without = (statistics.mean(after_saves[with_upload]) for with_upload in (True, False))
    result["upload_costs_of_a_step"] = (with_copy - without) / STEPS_PER_SAVE
    result["save_s"] = statistics.median(saves)
    result["save_share_of_a_step"] = result["save_s"] / step_s
    ends = []
    for number in range(3):
        moment = number / 3 * step_s
        ends.append(seconds_after_sigterm(folder / f"stopped-{number}", model, overrides, moment))
    result["slowest_sigterm_to_checkpoint_s"] = max(saved for saved, _ in ends)
    result["slowest_sigterm_to_exit_s"] = max(ended for _, ended in ends)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, help="where to save; default: the folder of temporary files")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        result = measure_saves(Path(scratch))
        result |= measure_training(Path(scratch), options.model, options.overrides)
    for name in ("adapter", "adapter_with_adam"):
        share = result[f"gemma_save_{name}_s"] / result["step_without_upload_s"]
        result[f"gemma_save_{name}_share_of_a_step"] = share
    width = max(map(len, result))
    for name, value in result.items():
        sys.stdout.write(f"{name.ljust(width)}  {value:.4f}\n")
    sys.stdout.write(json.dumps({name: round(value, 4) for name, value in result.items()}) + "\n")


if __name__ == "__main__":
    main()
