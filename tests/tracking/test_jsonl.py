"""The files of a run: strict lines, whole after a crash, one story after a resume."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trietune.tracking import jsonl
from trietune.tracking.events import Event, Message, RunStarted, StepFinished
from trietune.tracking.tracker import StillTrying, Tracker

Events = Callable[..., Iterator[Event]]


def write_run(events: Iterator[Event]) -> None:
    listener = jsonl.FilesListener(now=lambda: 1764000000.1234)
    tracker = Tracker([listener])
    for event in events:
        tracker.emit(event)
    tracker.close()


def lines_of(path: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no strict JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_file_of_the_design_is_there_with_its_keys(tmp_path: Path, events: Events) -> None:
    write_run(events(tmp_path / "sst2"))
    metrics = lines_of(tmp_path / "sst2" / "metrics.jsonl")
    steps = [line for line in metrics if line["event"] == "step"]
    assert [line["step"] for line in steps] == [2, 4, 6, 8, 10, 12]
    assert steps[0]["train/loss"] == 1.0
    assert steps[0]["epoch"] == 2 / 6
    wanted = {"learning_rate", "grad_norm", "examples_per_second", "tokens_per_second", "sharing_factor"}
    assert wanted <= steps[0].keys()
    evaluations = [line for line in metrics if line["event"] == "evaluation"]
    assert [line["when"] for line in evaluations] == ["before", "during", "during", "after"]
    assert evaluations[-1]["eval/accuracy"] == 0.875
    assert evaluations[-1]["num_examples"] == 200
    assert evaluations[-1]["intervals"] == {"eval/accuracy": [0.825, 0.925]}
    assert [line["directory"] for line in metrics if line["event"] == "saved"] == [
        "checkpoints/step-00000006",
        "checkpoints/step-00000012",
        "adapter",
    ]
    assert metrics[-1] == {
        "event": "end",
        "step": 12,
        "time": 1764000000.123,
        "status": "finished",
        "seconds": 93.4,
        "summary": {"eval/accuracy": 0.875},
    }
    batches = lines_of(tmp_path / "sst2" / "batches.jsonl")
    assert [line["step"] for line in batches] == list(range(1, 13))  # every step, logged or not
    assert batches[2] == {"step": 3, "epoch": 0.5, "ids": ["reviews.tsv:3", "reviews.tsv:53"]}
    assert [line["is_right"] for line in lines_of(tmp_path / "sst2" / "predictions.jsonl")] == [True, False]


def test_what_was_said_before_the_folder_had_a_name_is_kept(tmp_path: Path, events: Events) -> None:
    write_run(events(tmp_path / "sst2"))
    first, second = lines_of(tmp_path / "sst2" / "metrics.jsonl")[:2]
    assert first["event"] == "info"
    assert first["text"].startswith("reviews.tsv: 800 read")
    assert second["event"] == "warning"


def test_settings_come_back_as_they_were(tmp_path: Path, events: Events) -> None:
    from ruamel.yaml import YAML

    write_run(events(tmp_path / "sst2"))
    config = YAML(typ="safe", pure=True).load((tmp_path / "sst2" / "config.yaml").read_text())
    assert list(config) == [
        "model_name",
        "dataset_id",
        "learning_rate",
        "lora_target_modules",
        "wandb_tags",
        "max_steps",
    ]
    assert config["learning_rate"] == 2e-4
    assert config["wandb_tags"] == ["a", "b"]
    assert config["max_steps"] is None
    assert json.loads((tmp_path / "sst2" / "environment.json").read_text())["device"] == "cpu"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_becomes_null(value: float) -> None:
    assert jsonl.to_json_line({"train/loss": value}) == b'{"train/loss": null}\n'


def test_numpy_paths_and_lone_surrogates_become_json() -> None:
    import numpy as np

    record = {"a": np.float32(0.5), "b": np.arange(2), "c": Path("x/y"), "d": "\udcff\u2028", "e": np.float64("nan")}
    line = jsonl.to_json_line(record)
    assert line.count(b"\n") == 1
    assert json.loads(line) == {"a": 0.5, "b": [0, 1], "c": "x/y", "d": "\udcff\u2028", "e": None}


def test_a_full_disk_delays_lines_and_tears_none(
    tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes half a line, then nothing for a while."""
    listener = jsonl.FilesListener()
    is_full = False
    real_write = os.write

    def write(descriptor: int, content: bytes) -> int:
        if not is_full:
            return real_write(descriptor, content)
        if len(content) > 20:
            return real_write(descriptor, bytes(content[:20]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    refusals: list[str] = []
    for number, event in enumerate(events(tmp_path / "sst2")):
        is_full = 8 <= number < 14
        try:
            listener.handle(event)
        except StillTrying as trouble:
            refusals.append(str(trouble))
        path = tmp_path / "sst2" / "metrics.jsonl"
        if path.exists():
            assert path.read_bytes()[-1:] in (b"\n", b"")
            lines_of(path)
    listener.close()
    assert len(refusals) > 2
    assert all("No space left on device" in refusal for refusal in refusals)
    assert [line["step"] for line in lines_of(tmp_path / "sst2" / "batches.jsonl")] == list(range(1, 13))
    assert len([line for line in lines_of(tmp_path / "sst2" / "metrics.jsonl") if line["event"] == "step"]) == 6


def test_a_folder_that_cannot_be_written_is_tried_again(tmp_path: Path, events: Events) -> None:
    directory = tmp_path / "taken"
    directory.write_text("a file where the folder should be")
    listener = jsonl.FilesListener()
    stream = events(directory)
    started = next(event for event in stream if isinstance(event, RunStarted))
    with pytest.raises(StillTrying):
        listener.handle(started)
    directory.unlink()
    listener.handle(Message("the folder is free now"))
    listener.handle(StepFinished(1, 0.1, {"train/loss": 1.0}, ["a"], True))
    listener.close()
    assert [line["event"] for line in lines_of(directory / "metrics.jsonl")] == ["start", "info", "step"]
    assert (directory / "config.yaml").exists()
