"""Copies of one command would do the same work several times: they are refused before anything is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trietune
from trietune.cli.app import main
from trietune.errors import UserError
from trietune.ranks.launched import refuse_several_processes


def test_torchrun_with_two_processes_ends_in_one_sentence_and_leaves_no_folder(tmp_path: Path) -> None:
    launched = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "trietune", "train", "--set", "project_dir=runs",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert launched.returncode != 0
    assert "2 processes were started, and each would do the whole work" in launched.stderr
    assert "WORLD_SIZE=2, as torchrun sets it" in launched.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["train", "dry-run", "evaluate", "predict", "export"])
def test_each_command_that_loads_a_model_refuses(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    target = str(tmp_path / "adapter")
    arguments = {
        "train": ["train", "--set", f"project_dir={tmp_path}/runs"],
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
    settings = trietune.load_config(None, {"project_dir": str(tmp_path / "runs")})
    with pytest.raises(UserError, match="2 processes"):
        trietune.train(settings)
    with pytest.raises(UserError, match="2 processes"):
        trietune.evaluate(tmp_path)
    assert not list(tmp_path.iterdir())


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
