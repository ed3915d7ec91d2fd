"""Trainings by the workers of a real Ray cluster: the result of `--nproc`, whatever is lost on the way."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from ray_cluster.conftest import HERE, WITH_RAY

LIMIT_S = 600
# A resume on as many workers repeats every bit; another number of them adds up in another order, in fp32.
OTHER_NUMBER_TOLERANCE = 1e-3


def settings(overrides: dict[str, object], **changed: object) -> list[str]:
    values = {**overrides, "max_steps": 24, "num_epochs": 100, "save_strategy": "step", "steps_freq": 4,
              "save_optim": True, "val_steps_freq": 1000, **changed}  # fmt: skip
    return [f"--set={key}={value}" for key, value in values.items()]


def start(*arguments: str, program: tuple[str, ...] = ("-m", "trietune")) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [str(WITH_RAY), *program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
    )


def end(child: subprocess.Popen[str], code: int = 0) -> str:
    out, err = child.communicate(timeout=LIMIT_S)
    assert child.returncode == code, f"{child.returncode}\n{out}\n{err}"
    return out + err


def run_of(overrides: dict[str, object]) -> Path:
    return Path(str(overrides["project_dir"])) / "run"


def adapter(run: Path) -> np.ndarray:
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def digest(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def wait_for(condition: Callable[[], object], child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in (run / "checkpoints").glob("step-*"))


def workers_of(child: subprocess.Popen[str]) -> list[psutil.Process]:
    """Processes of Ray's workers that train."""
    found = []
    for process in psutil.Process(child.pid).children(recursive=True):
        try:
            if "TrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, reviews: Path) -> tuple[Path, str]:
    """A run of two workers that nothing disturbs, and what its user saw."""
    folder = tmp_path_factory.mktemp("undisturbed")
    own = own_settings(folder, tiny_model, reviews)
    text = end(start("train", "--ray", "--num-workers", "2", *settings(own)))
    return folder / "runs" / "run", text


def own_settings(folder: Path, tiny_model: Path, reviews: Path) -> dict[str, object]:
    return {
        "model_name": str(tiny_model), "dataset_id": "sst2", "train_file": str(reviews / "train.tsv"),
        "validation_file": str(reviews / "dev.tsv"), "max_length": 128, "dtype": "float32", "batch_size": 8,
        "learning_rate": 1e-2, "project_dir": str(folder / "runs"), "wandb_run_name": "run", "use_wandb": False,
        "device": "cpu", "print_examples": False,
    }  # fmt: skip


@pytest.fixture
def own(tmp_path: Path, tiny_model: Path, reviews: Path) -> dict[str, object]:
    return own_settings(tmp_path, tiny_model, reviews)


def test_workers_train_what_processes_train(undisturbed: tuple[Path, str], own: dict[str, object]) -> None:
    run, text = undisturbed
    end(start("train", "--nproc", "2", *settings(own)))
    assert digest(run) == digest(run_of(own))
    assert "2 processes; each computes its part of 8 examples" in text
    assert text.count("loading ") == 1
    # Nothing of Ray's own: no process ids in front of lines, no warnings, no addresses.
    assert not re.search(r"\(.*pid=|WARNING|Traceback|dashboard|raylet", text), text
    assert not (run.parent / ".ray").exists()
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2


def test_a_killed_worker_costs_time_and_nothing_else(undisturbed: tuple[Path, str], own: dict[str, object]) -> None:
    child = start("train", "--ray", "--num-workers", "2", "--restarts", "2", *settings(own))
    wait_for(lambda: saved_steps(run_of(own))[-1:] >= [8], child)
    workers = workers_of(child)
    assert len(workers) == 2
    workers[1].kill()
    text = end(child)
    assert "workers start again from the newest whole checkpoint" in text
    assert "Traceback" not in text
    assert digest(run_of(own)) == digest(undisturbed[0])


def test_without_restarts_a_killed_worker_ends_with_7_and_a_next_step(own: dict[str, object]) -> None:
    child = start("train", "--ray", "--num-workers", "2", *settings(own, max_steps=100_000))
    wait_for(lambda: saved_steps(run_of(own)), child)
    workers_of(child)[0].kill()
    text = end(child, 7)
    assert text.count("error:") == 1
    assert "`--resume` resumes from the newest whole checkpoint" in text
    assert "Traceback" not in text


def test_ctrl_c_saves_and_any_number_goes_on(own: dict[str, object]) -> None:
    # A training that may become shorter without having been another one.
    constant: dict[str, object] = {**own, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    child = start("train", "--ray", "--num-workers", "2", *settings(constant, max_steps=100_000))
    wait_for(lambda: saved_steps(run_of(own)), child)
    child.send_signal(signal.SIGINT)
    text = end(child, 130)
    assert "Traceback" not in text
    step = saved_steps(run_of(own))[-1]
    text = end(start("train", "--nproc", "2", "--resume", *settings(constant, max_steps=step + 2)))
    assert f"resuming from step {step}" in text


def test_a_lost_node_is_gone_on_without(undisturbed: tuple[Path, str], own: dict[str, object]) -> None:
    command = [str(WITH_RAY), "-m", "trietune", "train", "--ray", "--num-workers", "1,2", "--restarts", "3",
               *settings(own)]  # fmt: skip
    metrics = run_of(own) / "metrics.jsonl"
    text = end(start(str(HERE / "nodes.py"), str(metrics), "3", *command, program=()))
    assert "a node is lost" in text
    assert "1 workers start again from the newest whole checkpoint" in text
    difference = np.linalg.norm(adapter(run_of(own)) - adapter(undisturbed[0])) / np.linalg.norm(
        adapter(undisturbed[0])
    )
    assert difference < OTHER_NUMBER_TOLERANCE


def test_a_mistake_is_said_once_and_not_repeated(own: dict[str, object]) -> None:
    given = settings(own, lora_target_modules="[no_such_layer]")
    text = end(start("train", "--ray", "--num-workers", "2", "--restarts", "3", *given), 2)
    assert text.count("error:") == 1
    assert "no_such_layer" in text
    assert "start again" not in text


def test_a_sweep_of_tasks_ends_in_one_comparison(own: dict[str, object]) -> None:
    given = settings({key: value for key, value in own.items() if key != "learning_rate"}, max_steps=3)
    text = end(start("sweep", "--ray", "--over", "learning_rate=1e-3,1e-2", "--over", "lora_r=2,4", *given))
    assert len(re.findall(r"^1e-[23] +[24] ", text, re.MULTILINE)) == 4
    assert "best loss" in text
    assert (run_of(own).with_name("run-sweep") / "comparison.html").is_file()


def test_a_cluster_that_is_not_there_is_named(own: dict[str, object]) -> None:
    text = end(start("train", "--ray", "--address", "127.0.0.1:1", *settings(own)), 2)
    assert "no Ray cluster at `127.0.0.1:1`" in text
