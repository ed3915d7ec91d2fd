"""A stop while the best weights are measured saves the last step's, under the last step's name."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slow_cases import slow_but
from trietune import load_config, train
from trietune.io import manifest
from trietune.io.directory import read_directory, read_manifest
from trietune.model.adapter import adapter as adapter_module
from trietune.run.result import Run
from trietune.run.session import Session
from trietune.tracking.events import Event, Message, Saved
from trietune.tracking.tracker import Tracker

WEIGHTS = "adapter_model.safetensors"


class Stopper:
    """Sends a signal in the final evaluation, after the best weights (planted: those of step 2) have been taken."""

    name = "stopper"

    def __init__(self, number: signal.Signals | None) -> None:
        self.number = number
        self.has_taken_best = False

    def handle(self, event: Event) -> None:
        if isinstance(event, Saved) and event.kind == "checkpoint" and event.step == 2:
            found = read_manifest(event.directory)
            info = replace(found.info, metrics={"eval/loss": 1e-6})
            (event.directory / "manifest.json").write_bytes(manifest.serialize(replace(found, info=info)))
        if isinstance(event, Message) and "the final adapter is from step" in event.text:
            self.has_taken_best = True
            if self.number is not None:
                os.kill(os.getpid(), self.number)

    def close(self) -> None:
        pass


@pytest.fixture
def settings(overrides: dict[str, object]) -> dict[str, object]:
    # Step 5 is no checkpoint of its own.
    return {
        **overrides, "max_steps": 5, "save_strategy": "step", "steps_freq": 2, "val_steps_freq": 1, "save_optim": True,
        "self_check": False,
    }  # fmt: skip


def start(settings: dict[str, object], number: signal.Signals | None = None) -> tuple[Run, Stopper]:
    stopper = Stopper(number)
    made = load_config(None, [f"{key}={value}" for key, value in settings.items()])
    return train(made, tracker=Tracker([stopper])), stopper


def weights(folder: Path) -> bytes:
    return read_directory(folder)[1][WEIGHTS]


@pytest.mark.parametrize("number", [signal.SIGTERM])
@pytest.mark.parametrize("changes", slow_but([{}, {"modules_to_save": ["lm_head"]}], {}))
def test_a_stop_in_the_final_evaluation_saves_the_last_steps_weights(
    number: signal.Signals, changes: dict[str, object], settings: dict[str, object]
) -> None:
    settings = {**settings, **changes}
    best = Path(str(settings["project_dir"])) / "run" / "checkpoints" / "step-00000002"
    stopped, stopper = start(settings, number)
    assert stopper.has_taken_best
    assert (stopped.status, stopped.exit_code) == ("stopped", 128 + number)
    last = weights(stopped.directory / "checkpoints" / "step-00000005")
    uncut, _ = start({**settings, "wandb_run_name": "uncut", "steps_freq": 1, "keep_last_n": 9})
    assert last == weights(uncut.directory / "checkpoints" / "step-00000005")
    assert last != weights(best)
    resumed, _ = start({**settings, "resume_from_checkpoint": True})
    again, _ = start({**settings, "wandb_run_name": "again"})
    assert weights(resumed.directory / "adapter") == weights(again.directory / "adapter") == weights(best)


@pytest.mark.parametrize("ending", [None, signal.SIGTERM])
def test_after_the_end_the_model_has_the_last_steps_weights(
    ending: signal.Signals | None, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[Any] = []
    monkeypatch.setattr(Session, "run", lambda self, run=Session.run: (sessions.append(self), run(self))[1])
    run, stopper = start({**settings, "steps_freq": 1, "keep_last_n": 9}, ending)
    assert stopper.has_taken_best
    live = adapter_module.adapter_files(sessions[0].built.peft_model, sessions[0].prepared.base)[WEIGHTS]
    assert live == weights(run.directory / "checkpoints" / "step-00000005")
