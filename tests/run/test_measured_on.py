"""Checkpoints are ranked only against those that were measured on the same validation examples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from trietune import load_config, train
from trietune.checkpoints.measured import MEASURED_ON
from trietune.io import manifest
from trietune.io.directory import read_manifest
from trietune.run.result import Run
from trietune.tracking.tracker import Tracker

Settings = dict[str, object]


@pytest.fixture
def settings(overrides: Settings) -> Settings:
    return {
        **overrides, "save_strategy": "step", "steps_freq": 1, "val_steps_freq": 1, "save_optim": True,
        "keep_last_n": 1, "keep_best_n": 1, "self_check": False, "resume_from_checkpoint": "auto",
    }  # fmt: skip


def start(settings: Settings) -> Run:
    return train(
        load_config(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()]), tracker=Tracker()
    )


def steps(run: Run) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run.directory / "checkpoints").glob("step-*"))


def plant(run: Run, losses: dict[int, float], *, is_old: bool) -> None:
    """Give checkpoints other losses; old ones do not say what they were measured on."""
    for step, loss in losses.items():
        path = run.directory / "checkpoints" / f"step-{step:08d}"
        found = read_manifest(path)
        details = {key: value for key, value in found.info.details.items() if key != MEASURED_ON or not is_old}
        info = replace(found.info, metrics={"eval/loss": loss}, details=details)
        (path / "manifest.json").write_bytes(manifest.serialize(replace(found, info=info)))


@pytest.mark.slow
@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("change", ["validation_file", "eval_max_examples"])
def test_one_measured_on_something_else_pushes_nothing_out(
    change: str, is_old: bool, settings: Settings, tmp_path: Path
) -> None:
    first = start({**settings, "max_steps": 3, "keep_last_n": 2})
    plant(first, {2: 1e6, 3: 2e6}, is_old=is_old)
    lines = Path(str(settings["validation_file"])).read_text().splitlines()
    (tmp_path / "other.tsv").write_text("\n".join(lines[:8]) + "\n")
    changes: Settings = {"validation_file": str(tmp_path / "other.tsv")}
    if change == "eval_max_examples":
        changes = {"eval_max_examples": 5}
    resumed = start({**settings, "max_steps": 5, **changes})
    losses = {step: read_manifest(resumed.directory / f"checkpoints/step-{step:08d}").info.metrics["eval/loss"]
              for step in steps(resumed)}  # fmt: skip
    assert min(loss for loss in losses.values() if loss is not None) < 1e6, "nothing was measured to be better"
    assert 2 in steps(resumed), "the best of those measured before was removed"
    assert 5 in steps(resumed)
    assert len(steps(resumed)) <= 3
    # Whatever is best on the data of before says nothing about the final adapter.
    assert read_manifest(resumed.directory / "adapter").info.step in (4, 5)


# An older checkpoint cannot know how many examples `auto` took, so the last case is of new ones.
@pytest.mark.parametrize(("changes", "is_old"), [({}, False), ({}, True), ({"val_steps_freq": 2}, False)])
def test_on_the_same_examples_old_and_new_are_ranked_together(
    changes: Settings, is_old: bool, settings: Settings
) -> None:
    first = start({**settings, "max_steps": 2})
    plant(first, {2: 1e-6}, is_old=is_old)
    resumed = start({**settings, "max_steps": 5, **changes})
    assert steps(resumed) == [2, 5]
    assert read_manifest(resumed.directory / "adapter").info.step == 2
