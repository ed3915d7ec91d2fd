"""Whole runs over several processes: one folder, the result of one process, stops and resumes, mistakes said once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from safetensors.numpy import load_file

from ranks import jobs
from ranks.pool import Pool
from trietune.errors import UserError
from trietune.ranks.launched import Launched

# fp32: Adam divides rounding by rounding, so adapters are further apart than gradients.
ADAPTER_TOLERANCE, METRIC_TOLERANCE = 1e-3, 1e-4


def adapter(run: dict[str, Any]) -> np.ndarray:
    tensors = load_file(Path(run["adapter"]) / "adapter_model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def differ(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.slow
def test_two_processes_leave_one_folder_with_the_result_of_one(pool: Pool, overrides: dict[str, object]) -> None:
    alone = jobs.whole_run({**overrides, "wandb_run_name": "alone"})
    first, second = pool.run(2, jobs.whole_run, overrides)
    assert first["status"] == second["status"] == "finished", (first, second)
    assert first["directory"] == second["directory"] == str(Path(str(overrides["project_dir"])) / "run")
    assert sorted(path.name for path in Path(str(overrides["project_dir"])).iterdir()) == ["alone", "run"]
    assert differ(adapter(first), adapter(alone)) < ADAPTER_TOLERANCE
    for when in ("before", "after"):
        assert first[when] == second[when]
        assert first[when] == pytest.approx(alone[when], rel=METRIC_TOLERANCE)
    assert [m["train/loss"] for m in first["metrics"]] == pytest.approx(
        [m["train/loss"] for m in alone["metrics"]], rel=METRIC_TOLERANCE
    )
    assert [m["num_labels"] for m in first["metrics"]] == [m["num_labels"] for m in alone["metrics"]]
    assert first["metrics"][-1]["world_size"] == 2
    assert first["metrics"][-1]["ranks/imbalance"] >= 1
    assert 0 <= first["metrics"][-1]["ranks/waiting_share"] <= 1
    assert "world_size" not in alone["metrics"][-1]
    assert "2 processes; each computes its part of 8 examples" in first["plan"]["processes"]
    assert any("they share each step (data parallel)" in text for text in first["said"])
    assert second["said"] == []
    assert json.loads((Path(first["directory"]) / "environment.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_more_processes_than_examples_train_and_measure_what_one_does(
    pool: Pool, overrides: dict[str, object], reviews: Path, tmp_path: Path
) -> None:
    for name, size in (("train.tsv", 3), ("dev.tsv", 1)):
        lines = (reviews / name).read_text().splitlines(keepends=True)
        (tmp_path / name).write_text("".join(lines[: size + 1]))
    settings = {
        **overrides, "train_file": str(tmp_path / "train.tsv"), "validation_file": str(tmp_path / "dev.tsv"),
        "gradient_accumulation_steps": 2, "batch_size": 1, "num_epochs": 9,
    }  # fmt: skip
    alone = jobs.whole_run({**settings, "wandb_run_name": "alone"})
    runs = pool.run(4, jobs.whole_run, settings)
    assert [run["status"] for run in runs] == ["finished"] * 4, runs
    assert differ(adapter(runs[0]), adapter(alone)) < ADAPTER_TOLERANCE
    for when in ("before", "after"):
        assert runs[3][when] == pytest.approx(alone[when], rel=METRIC_TOLERANCE)


@pytest.mark.slow
def test_all_processes_lose_patience_and_run_out_of_time_after_the_same_step(
    pool: Pool, overrides: dict[str, object]
) -> None:
    # The rate is so high that the loss rises.
    patient = {**overrides, "early_stopping_patience": 1, "early_stopping_threshold": 100.0, "val_steps_freq": 1}
    runs = pool.run(2, jobs.whole_run, patient)
    assert [(run["status"], run["step"]) for run in runs] == [("finished", runs[0]["step"])] * 2, runs
    assert runs[0]["step"] < 6
    hurried = {**overrides, "wandb_run_name": "hurried", "max_time": 0.001}
    first, second = (run.get("error") or (run["status"], run["step"]) for run in pool.run(2, jobs.whole_run, hurried))
    assert first == second


def test_a_signal_to_one_process_stops_all_and_any_number_goes_on(pool: Pool, overrides: dict[str, object]) -> None:
    settings = {**overrides, "save_optim": True}
    alone = jobs.whole_run({**settings, "wandb_run_name": "alone"})
    stopped = pool.run(2, jobs.whole_run, settings, react="signal at step 3")
    # Rank 0 tells the others with the numbers of the step that follows.
    assert [(one["status"], one["step"], one["exit_code"]) for one in stopped] == [("stopped", 4, 143)] * 2
    assert (Path(stopped[0]["directory"]) / "checkpoints" / "step-00000004").is_dir()
    resumed = pool.run(3, jobs.whole_run, {**settings, "resume_from_checkpoint": "auto"})
    assert [one["status"] for one in resumed] == ["finished"] * 3, resumed
    assert differ(adapter(resumed[0]), adapter(alone)) < ADAPTER_TOLERANCE
    assert any("resuming from step 4 with the optimizer" in text for text in resumed[0]["said"])


def test_a_mistake_is_said_once_and_ends_all(pool: Pool, overrides: dict[str, object]) -> None:
    results = pool.run(3, jobs.whole_run, {**overrides, "lora_target_modules": ["no_such_layer"]})
    kinds = [one["error"][0] for one in results]
    assert kinds == ["UserError", "FailedElsewhere", "FailedElsewhere"]
    assert {one["error"][2] for one in results} == {2}


def test_settings_that_differ_are_named(pool: Pool, overrides: dict[str, object]) -> None:
    results = pool.run(2, jobs.run_with_odd_rank, overrides, {"learning_rate": 2e-2})
    assert "`learning_rate` differs" in results[0]["error"][1]
    assert results[1]["error"][0] == "FailedElsewhere"


@pytest.mark.parametrize(("how", "step"), [("no", 4), ("step", 3)])
def test_a_folder_that_is_moved_is_followed_once_and_all_stop(
    pool: Pool, overrides: dict[str, object], how: str, step: int
) -> None:
    settings = {**overrides, "save_strategy": how, "steps_freq": 3}
    results = pool.run(2, jobs.whole_run, settings, react="folder moved at step 3")
    assert [one["error"][0] for one in results] == ["UserError", "FailedElsewhere"], results
    assert "was moved to" in results[0]["error"][1]
    # Where nothing is saved, rank 0 tells the others with the numbers of the step that follows.
    assert (Path(str(overrides["project_dir"])) / "moved" / "checkpoints" / f"step-{step:08d}").is_dir()
    assert not (Path(str(overrides["project_dir"])) / "run").exists()


def test_a_mesh_with_several_processes_is_refused(pool: Pool, overrides: dict[str, object]) -> None:
    first, _ = pool.run(2, jobs.whole_run, {**overrides, "mesh_shape": "2,1"})
    assert first["error"][2] == 2
    assert "`mesh_shape`" in first["error"][1]


def test_data_parallel_with_one_process_is_said(overrides: dict[str, object]) -> None:
    run = jobs.whole_run({**overrides, "parallelism_strategy": "data_parallel", "max_steps": 1})
    assert run["status"] == "finished"
    assert any("one process: trained as `single`" in text for text in run["said"])


def test_questions_are_answered_in_parts(
    pool: Pool, overrides: dict[str, object], questions: Path, tiny_model: Path
) -> None:
    settings = {
        **overrides, "train_file": str(questions / "train.json"), "validation_file": str(questions / "dev.json"),
        "dataset_id": "squad_v2", "max_length": 512, "max_steps": 2, "batch_size": 4,
    }  # fmt: skip
    alone = jobs.whole_run({**settings, "wandb_run_name": "alone"})
    first, second = pool.run(2, jobs.whole_run, settings)
    assert first["before"].keys() == alone["before"].keys() >= {"eval/f1"}
    assert first["before"] == pytest.approx(alone["before"], rel=METRIC_TOLERANCE)
    assert second["after"] == first["after"]


def command_line(settings: dict[str, object]) -> list[str]:
    return [f"--set={key}={value}" for key, value in settings.items()]


def trietune(*arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trietune", *arguments],
        capture_output=True, text=True, timeout=timeout, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_nproc_trains_with_one_command(overrides: dict[str, object]) -> None:
    ended = trietune("train", "--nproc", "2", *command_line({**overrides, "max_steps": 2}))
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("loading ") == 1
    assert "2 processes; each computes its part of 8 examples" in ended.stderr
    assert (Path(str(overrides["project_dir"])) / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_dry_run_with_nproc_plans_for_several_and_starts_none(
    overrides: dict[str, object], capfd: pytest.CaptureFixture[str]
) -> None:
    from trietune.cli.app import main

    assert main(["train", "--nproc", "4", "--dry-run", *command_line(overrides)]) == 0
    out, _ = capfd.readouterr()
    assert "4 processes; each computes its part of 8 examples" in out
    assert "by all processes" in out
    assert not Path(str(overrides["project_dir"])).exists()
    assert "LOCAL_WORLD_SIZE" not in os.environ


def test_more_base_models_than_memory_are_refused(
    overrides: dict[str, object], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trietune.cli.app import main
    from trietune.device import cpu

    one = 100_000  # bytes; the tiny model has twice as many in fp32
    monkeypatch.setattr(cpu.psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * one))
    assert main(["train", "--nproc", "3", "--dry-run", *command_line(overrides)]) == 2
    err = capfd.readouterr().err
    assert "for its weights in each of 3 processes" in err
    assert main(["train", "--dry-run", *command_line(overrides)]) == 0


def test_restarts_need_processes(capfd: pytest.CaptureFixture[str]) -> None:
    from trietune.cli.app import main

    assert main(["train", "--restarts", "2"]) == 2
    assert "`--nproc`" in capfd.readouterr().err


@pytest.mark.parametrize(("device", "is_refused"), [("auto", True), ("cpu", False)])
def test_each_process_needs_a_card_where_cards_are_used(
    device: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trietune.ranks import together

    monkeypatch.setattr(together.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(together.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    backends: list[str] = []

    def stop(launched: Launched, backend: str, *arguments: object, **options: object) -> None:
        backends.append(backend)
        raise InterruptedError

    monkeypatch.setattr(together, "meet", lambda *arguments, **options: object())
    monkeypatch.setattr(together, "Watch", lambda *arguments, **options: MagicMock())
    monkeypatch.setattr(together, "connect", stop)
    with pytest.raises(UserError if is_refused else InterruptedError) as ended:
        together.Together(Launched(0, 2, 0, 2), may_use_cuda=device == "auto")
    assert ("2 processes were started on a machine with 1 CUDA devices" in str(ended.value)) == is_refused
    assert backends == ([] if is_refused else ["gloo"])


@pytest.mark.parametrize("value", ["0", "two", "-1"])
def test_nproc_takes_a_number(value: str, capfd: pytest.CaptureFixture[str]) -> None:
    from trietune.cli.app import main

    assert main(["train", f"--nproc={value}"]) == 2
    assert "is not a number of processes" in capfd.readouterr().err
