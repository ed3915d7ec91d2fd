"""What launchers say of the processes that they started, and the commands that refuse to be one of several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import trietune
from trietune.cli.app import main
from trietune.device.cpu import free_host_bytes
from trietune.errors import UserError
from trietune.ranks.launched import BEGAN, Launched, processes_here, read_launched, refuse_several_processes


@pytest.mark.slow
def test_torchrun_trains_once_over_its_processes(overrides: dict[str, object], tmp_path: Path) -> None:
    launched = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "trietune", "train", *[f"--set={key}={value}" for key, value in overrides.items()],
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    runs = Path(str(overrides["project_dir"]))
    assert [path.name for path in runs.iterdir()] == ["run"]
    assert (runs / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("command", ["dry-run", "nproc", "evaluate", "predict", "export"])
def test_each_command_that_does_not_share_its_work_refuses(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    target = str(tmp_path / "adapter")
    arguments = {
        "nproc": ["train", "--nproc", "2", "--set", f"project_dir={tmp_path}/runs"],
        "dry-run": ["train", "--dry-run", "--set", f"project_dir={tmp_path}/runs"],
        "evaluate": ["evaluate", target],
        "predict": ["predict", target, "--text", "a"],
        "export": ["export", target, str(tmp_path / "out")],
    }[command]
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert "4 processes were started" in err
    assert not out
    assert not list(tmp_path.iterdir())


def test_python_refuses_as_the_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes"):
        trietune.evaluate(tmp_path)
    settings = trietune.load_config(None, {"project_dir": str(tmp_path / "runs")})
    with pytest.raises(UserError, match="RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set"):
        trietune.train(settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_training_does_not_take_processes_that_do_not_know_of_each_other(variable: str) -> None:
    with pytest.raises(UserError, match="they do not know of each other") as refused:
        read_launched({variable: "3"})
    assert "torchrun" in str(refused.value)


def test_the_place_among_launched_processes_is_read() -> None:
    environ = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a",
               "MASTER_PORT": "1"}  # fmt: skip
    assert read_launched(environ) == Launched(5, 8, 1, 4)
    assert read_launched({}) == read_launched({**environ, "WORLD_SIZE": "1"}) == Launched()
    assert processes_here(environ) == 4
    assert processes_here({"LOCAL_WORLD_SIZE": "4"}) == 1


WHOLE = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a",
         "MASTER_PORT": "1"}  # fmt: skip


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("WORLD_SIZE", "all"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "-2"), ("WORLD_SIZE", "2.0"),
        ("RANK", "first"), ("RANK", "8"), ("RANK", "-1"), ("LOCAL_RANK", "4"), ("LOCAL_WORLD_SIZE", "9"),
        ("LOCAL_WORLD_SIZE", "0"), ("MASTER_PORT", "http"), ("MASTER_PORT", "70000"), ("RANK", " "),
    ],
)  # fmt: skip
def test_a_training_does_not_guess_what_a_launcher_meant(variable: str, value: str) -> None:
    with pytest.raises(UserError, match=variable) as refused:
        read_launched({**WHOLE, variable: value})
    assert "trietune train --nproc N" in str(refused.value)


def test_a_process_with_a_number_does_not_train_alone() -> None:
    with pytest.raises(UserError, match="RANK=1 announces one of several processes, but WORLD_SIZE is not set"):
        read_launched({"RANK": "1"})
    assert read_launched({"RANK": "0"}) == Launched()


@pytest.mark.parametrize(("began", "expected"), [("12.5", 12.5), ("soon", None), (None, None)])
def test_max_time_counts_from_the_command_that_launched(
    began: str | None, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trietune.run.train as training

    counted: list[float] = []

    def train(settings: object, *, allowed_changes: frozenset[str], began: float) -> SimpleNamespace:
        counted.append(began)
        return SimpleNamespace(exit_code=0)

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setenv("WORLD_SIZE", "2")
    if began is not None:
        monkeypatch.setenv(BEGAN, began)
    before = time.monotonic()
    assert main(["train"]) == 0
    assert counted == [expected] if expected is not None else counted[0] >= before


def test_memory_of_the_machine_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = free_host_bytes()
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_host_bytes() < whole / 3


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_each_launcher_is_named(variable: str) -> None:
    with pytest.raises(UserError) as refused:
        refuse_several_processes({variable: "3"})
    assert f"{variable}=3" in str(refused.value)


@pytest.mark.parametrize(
    "environ",
    [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "all"}, {"SLURM_NTASKS": "8"}],
    ids=json.dumps,
)
def test_one_process_is_let_through(environ: dict[str, str]) -> None:
    refuse_several_processes(environ)
