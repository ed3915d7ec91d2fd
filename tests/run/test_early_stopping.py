"""Training ends when validation no longer improves, goes on counting after a stop, and leaves what any run leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from trietune import UserError, load_config, train
from trietune.run.early_stopping import EarlyStopping
from trietune.run.result import Run
from trietune.tracking.events import Evaluated, Event, Message
from trietune.tracking.tracker import Tracker


class Listener:
    name = "listener"

    def __init__(self) -> None:
        self.said: list[str] = []
        self.evaluated: list[tuple[int, str]] = []

    def handle(self, event: Event) -> None:
        if isinstance(event, Message):
            self.said.append(event.text)
        if isinstance(event, Evaluated):
            self.evaluated.append((event.step, event.when))

    def close(self) -> None:
        pass


@pytest.fixture
def settings(overrides: dict[str, object]) -> dict[str, object]:
    # Nothing is better by 100, so the first evaluation stays the best.
    return {
        **overrides, "max_steps": 6, "save_strategy": "step", "steps_freq": 1, "val_steps_freq": 1,
        "early_stopping_patience": 3, "early_stopping_threshold": 100, "self_check": False,
    }  # fmt: skip


def start(settings: dict[str, object], *allowed: str) -> tuple[Run, Listener]:
    listener = Listener()
    return train(
        load_config(None, settings, {}), tracker=Tracker([listener]), allowed_changes=frozenset(allowed)
    ), listener


def test_a_run_ends_when_its_patience_does_and_is_finished(settings: dict[str, object]) -> None:
    run, heard = start(settings)
    assert (run.status, run.step, run.exit_code) == ("finished", 4, 0)
    assert heard.evaluated == [(0, "before"), *((step, "during") for step in (1, 2, 3, 4)), (4, "after")]
    assert any(
        text.startswith("training ends early, after step 4: `eval/loss` was not better in 3") for text in heard.said
    )
    assert run.adapter is not None
    assert (run.directory / "checkpoints" / "step-00000004").is_dir()
    # It would end again, so there is nothing to go on with; without patience there is.
    again, heard = start({**settings, "resume_from_checkpoint": "auto"})
    assert (again.step, heard.evaluated) == (4, [])
    longer, _ = start(
        {**settings, "resume_from_checkpoint": "auto", "early_stopping_patience": None, "early_stopping_threshold": 0}
    )
    assert longer.step == 6


def test_a_resumed_run_goes_on_counting(settings: dict[str, object]) -> None:
    first, _ = start({**settings, "max_steps": 3, "lr_scheduler_type": "constant"})
    state = json.loads((first.directory / "checkpoints" / "step-00000003" / "trainer_state.json").read_text())
    assert state["early_stopping"]["waited"] == 2
    assert state["early_stopping"]["best_step"] == 1
    second, heard = start({**settings, "resume_from_checkpoint": True}, "max_steps")
    assert second.step == 4
    assert not any("counts from here on" in text for text in heard.said)


def test_a_checkpoint_of_a_run_without_patience_begins_the_count(settings: dict[str, object]) -> None:
    plain = {**settings, "early_stopping_patience": None, "early_stopping_threshold": 0, "max_steps": 2}
    start(plain)
    second, heard = start({**settings, "resume_from_checkpoint": True}, "max_steps")
    assert any("counts from here on" in text for text in heard.said)
    assert second.step == 6


@pytest.mark.parametrize(
    ("mode", "threshold", "values", "waited"),
    [
        ("min", 0.0, [0.9, 0.8, 0.81, 0.8], 2),
        ("max", 0.0, [0.5, 0.6, 0.6], 1),
        ("min", 0.05, [0.9, 0.88, 0.86, 0.84], 0),
        ("min", 0.0, [math.nan, math.nan], 2),
        ("min", 0.0, [0.9, math.nan, 0.8], 0),
        ("min", 0.0, [math.inf, 5.0], 0),
    ],
)
def test_evaluations_without_a_better_value_are_counted(
    mode: Any, threshold: float, values: list[float], waited: int
) -> None:
    patience = EarlyStopping("eval/x", mode == "min", 9, threshold)
    for step, value in enumerate(values):
        patience.note(step, {"eval/x": value})
    assert patience.waited == waited
    again = EarlyStopping("eval/x", mode == "min", 9, threshold)
    assert again.restore(json.loads(json.dumps(patience.state())))
    assert again == patience


def test_a_metric_that_is_not_measured_is_refused_before_training(settings: dict[str, object]) -> None:
    with pytest.raises(UserError, match="`eval/f1`, which is not measured on this data") as caught:
        start({**settings, "checkpoint_metric": "eval/f1", "checkpoint_metric_mode": "max"})
    assert "`eval/loss`" in str(caught.value)


def test_patience_without_validation_data_is_refused(settings: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text('{"prompt": "a", "completion": " b"}\n')
    with pytest.raises(UserError, match="there is no validation data"):
        start({**settings, "train_file": str(file), "validation_file": None, "dataset_id": None})


def test_a_threshold_without_patience_is_refused() -> None:
    with pytest.raises(UserError, match=r"`early_stopping_threshold: 0\.1`.*needs `early_stopping_patience`"):
        load_config(None, {"early_stopping_threshold": 0.1}, {})
