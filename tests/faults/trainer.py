"""A small real training run, started, watched, signalled and killed; what it left is compared bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trietune.checkpoints.store import step_of
from trietune.io.directory import read_directory, verify_directory

# Dropout, warm-up, weight decay and a falling rate: without them a resume that forgets something would go unnoticed.
SETTINGS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_length": 48, "batch_size": 4, "num_epochs": 3, "seed": 11,
    "learning_rate": 0.01, "lr_scheduler_type": "cosine", "warmup_steps": 5, "weight_decay": 0.1, "max_grad_norm": 1.0,
    "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.2, "lora_target_modules": ["all-linear"],
    "save_strategy": "step", "steps_freq": 2, "val_steps_freq": 4, "save_optim": True, "keep_last_n": 3,
    "keep_best_n": 1, "tracker": "none", "print_examples": False, "deterministic": True, "wandb_run_name": "run",
}  # fmt: skip
NUM_STEPS = 36
TIMED = {"examples_per_second", "tokens_per_second", "memory_bytes"}


@dataclass
class Life:
    """One process of the trainer; `status` as waitpid gives it, None while it runs."""

    pid: int
    output: Path
    status: int | None = None

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    @property
    def exit_code(self) -> int:
        assert self.status is not None
        return os.waitstatus_to_exitcode(self.status)


class Forge:
    """Starts trainers; see `trainer_forge.py`."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.number = 0

    def ask(self, command: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self, *arguments: object, environment: dict[str, str] | None = None, clock: str = "", num_threads: int = 1
    ) -> Life:
        """A `trietune` process with these arguments; `clock="back"` sets it back by an hour at every look."""
        self.number += 1
        output = self.folder / f"output-{self.number}.txt"
        command = {"arguments": [str(argument) for argument in arguments], "output": str(output), "clock": clock}
        return Life(self.ask({**command, "environment": environment or {}, "num_threads": num_threads}), output)

    def wait(self, life: Life) -> Life:
        life.status = self.ask({"wait": life.pid})
        return life

    def run(self, *arguments: object) -> Life:
        return self.wait(self.start(*arguments))


@contextmanager
def open_forge(folder: Path) -> Iterator[Forge]:
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "TRIETUNE_CACHE": str(folder / "cache"), "XDG_CACHE_HOME": str(folder / "cache"), "NO_COLOR": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("trainer_forge.py"))],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == "ready"
        yield Forge(process, folder)
    finally:
        process.kill()
        process.communicate()


def write_inputs(folder: Path) -> Path:
    """A tiny model and 48 + 8 examples with shared prefixes; returns the folder."""
    from tiny_model import write_tiny_model

    write_tiny_model(folder / "tiny")
    rows = []
    for number in range(56):
        text = f"the {number % 7} {'abcdefgh'[number % 8]} {number}"
        rows.append({"prompt": f"{text}: ", "completion": text[::-1][:6]})
    lines = [json.dumps(row) for row in rows]
    (folder / "train.jsonl").write_text("\n".join(lines[:48]) + "\n")
    (folder / "validation.jsonl").write_text("\n".join(lines[48:]) + "\n")
    return folder


def write_wide_model(folder: Path) -> Path:
    """Random weights wide enough for several threads to share a product; the tokenizer of `write_tiny_model`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tiny_model import write_tiny_model

    write_tiny_model(folder)
    wide = LlamaConfig.from_pretrained(folder, hidden_size=256, intermediate_size=512, head_dim=128)
    LlamaForCausalLM(wide).save_pretrained(folder)
    return folder


def write_config(inputs: Path, project: Path, **changes: Any) -> Path:
    """A YAML file for a run in `project`, which is made."""
    project.mkdir(parents=True, exist_ok=True)
    settings = {
        **SETTINGS, "model_name": str(inputs / "tiny"), "train_file": str(inputs / "train.jsonl"),
        "validation_file": str(inputs / "validation.jsonl"), "project_dir": str(project), **changes,
    }  # fmt: skip
    path = project / "config.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()))
    return path


def steps_on_disk(run: Path) -> list[int]:
    """Every visible checkpoint, each proven whole."""
    found = sorted((run / "checkpoints").glob("step-*")) if (run / "checkpoints").is_dir() else []
    return [step_of(verify_directory(path).path) for path in found]


def log_of(run: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without what depends on the clock."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in event.items() if key not in TIMED and "second" not in key and key != "time"}
            for event in events]  # fmt: skip


def assert_equal_runs(run: Path, reference: Path, num_steps: int = NUM_STEPS, cut_evaluation: int = -1) -> None:
    """Adapter, last checkpoint with optimizer, metrics and order of examples are those of `reference`, bit for bit.

    `cut_evaluation` is the step at which a signal stopped an evaluation, whose line may then be missing.
    """
    for name in ("adapter", f"checkpoints/step-{num_steps:08d}"):
        found, expected = read_directory(run / name), read_directory(reference / name)
        assert found[0].info.metrics == expected[0].info.metrics
        assert set(found[1]) == set(expected[1])
        for file in ("adapter_model.safetensors", "optimizer.safetensors"):
            assert found[1].get(file) == expected[1].get(file), f"{name}/{file} differs"
    found_lines, expected_lines = measured(run, cut_evaluation), measured(reference, cut_evaluation)
    differing = [pair for pair in zip(found_lines, expected_lines, strict=False) if pair[0] != pair[1]]
    assert found_lines == expected_lines, f"{len(found_lines)} and {len(expected_lines)} lines; first: {differing[:1]}"
    assert (run / "batches.jsonl").read_text() == (reference / "batches.jsonl").read_text()


def measured(run: Path, without_evaluation: int = -1) -> list[str]:
    """Steps and evaluations of the log, without what depends on the clock, each once."""
    return [
        json.dumps(event, sort_keys=True)
        for event in log_of(run)
        if event["event"] == "step" or (event["event"] == "evaluation" and event["step"] != without_evaluation)
    ]


def wait_for(condition: Any, *, timeout_s: float = 60, every_s: float = 0.005) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "what was waited for never came"
        time.sleep(every_s)


def kill(life: Life, number: signal.Signals) -> None:
    os.kill(life.pid, number)
