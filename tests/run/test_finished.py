"""A run that has finished is never trained again, whatever became of its checkpoints; its adapter stays as it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from slow_cases import slow_but
from trietune.cli.app import main

Settings = dict[str, object]
Resume = Callable[..., tuple[int, str]]


@pytest.fixture
def start(overrides: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Resume:
    """`start(*arguments, **changes)` is `trietune train` with these settings: its exit code and what it said."""

    def start(*arguments: str, **changes: object) -> tuple[int, str]:
        config = tmp_path / "config.yaml"
        config.write_text(json.dumps({**overrides, "max_steps": 3, "self_check": False, **changes}))
        capfd.readouterr()
        code = main(["train", str(config), *arguments])
        return code, capfd.readouterr().err

    return start


@pytest.fixture
def folder(overrides: Settings) -> Path:
    return Path(str(overrides["project_dir"])) / "run"


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_ino)
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize("choice", slow_but(["auto", True], True))
@pytest.mark.parametrize(
    "how",
    ["never a checkpoint", "checkpoints removed", "an empty folder of them", "the last one removed", "card edited"],
)
def test_a_finished_run_is_left_as_it_is(how: str, choice: object, start: Resume, folder: Path) -> None:
    changes: Settings = {"save_strategy": "no" if how == "never a checkpoint" else "step"}
    assert start(**changes)[0] == 0
    if how in ("checkpoints removed", "an empty folder of them"):
        shutil.rmtree(folder / "checkpoints")
    if how == "an empty folder of them":
        (folder / "checkpoints").mkdir()
    if how == "the last one removed":
        shutil.rmtree(folder / "checkpoints" / "step-00000003")
    if how == "card edited":
        (folder / "adapter" / "README.md").write_text("mine")
    before = snapshot(folder)
    code, said = start(**changes, resume_from_checkpoint=choice)
    assert code == 0, said
    assert "has already finished" in said
    assert snapshot(folder) == before


def test_a_shorter_plan_has_finished_too(start: Resume, folder: Path) -> None:
    assert start(save_strategy="no")[0] == 0
    before = snapshot(folder)
    code, said = start("--resume", save_strategy="no", max_steps=2)
    assert (code, "has already finished" in said) == (0, True), said
    assert snapshot(folder) == before


def test_a_longer_plan_goes_on_from_the_last_checkpoint(start: Resume, folder: Path) -> None:
    assert start(save_optim=True)[0] == 0
    code, said = start("--resume", save_optim=True, max_steps=5)
    assert code == 0, said
    assert "resuming from step 3" in said
    assert (folder / "checkpoints" / "step-00000005").is_dir()


@pytest.mark.parametrize("how", slow_but(["longer plan", "damaged", "another run's"], "longer plan"))
def test_without_a_checkpoint_an_adapter_is_never_replaced(how: str, start: Resume, folder: Path) -> None:
    assert start(save_strategy="no")[0] == 0
    if how == "damaged":
        os.truncate(folder / "adapter" / "adapter_model.safetensors", 100)
    if how == "another run's":
        (folder / ".run-id").write_text("0" * 32)
    before = snapshot(folder)
    for choice in ("auto", True):
        steps = 5 if how == "longer plan" else 3
        code, said = start(save_strategy="no", max_steps=steps, resume_from_checkpoint=choice)
        assert code == 6, said
        assert "no checkpoint to resume from" in said
        assert snapshot(folder) == before
    (folder / "adapter").rename(folder.parent / "moved-away")
    assert start("--resume", save_strategy="no", max_steps=5)[0] == 0


def test_an_adapter_of_another_training_is_not_called_finished(start: Resume, folder: Path) -> None:
    assert start(save_strategy="no")[0] == 0
    before = snapshot(folder)
    code, said = start("--resume", save_strategy="no", learning_rate=0.5)
    assert code == 6, said
    assert "--allow-change learning_rate" in said
    assert snapshot(folder) == before


def test_on_an_empty_machine_the_copy_of_the_adapter_is_asked(start: Resume, folder: Path, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    storage: Settings = {"save_strategy": "no", "remote_path": str(mirror), "sync_to_storage": True}
    assert start(**storage)[0] == 0
    copies = snapshot(mirror)
    shutil.rmtree(folder)
    code, said = start("--resume", **storage, load_from_storage=True)
    assert code == 0, said
    assert f"its adapter is in {mirror}/run/adapter" in said
    code, said = start("--resume", **storage, load_from_storage=True, max_steps=5)
    assert code == 6, said
    assert snapshot(mirror) == copies


def test_the_copy_of_another_runs_adapter_is_not_replaced(start: Resume, folder: Path, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    storage: Settings = {"save_strategy": "no", "remote_path": str(mirror), "sync_to_storage": True}
    assert start(**storage)[0] == 0
    copies = snapshot(mirror)
    shutil.rmtree(folder)
    code, said = start(**storage)
    assert code == 2, said
    assert "holds the adapter of another run" in said
    assert snapshot(mirror) == copies
