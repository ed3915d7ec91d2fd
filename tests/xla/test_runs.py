"""Whole runs: adapter, evaluation and answers as on the CPU, and checkpoints that go from one device to the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from run.conftest import questions, reviews, tiny_model  # noqa: F401  (fixtures)
from trietune import load_config, train

# fp32 on both sides.
LOSS_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 1e-4


@pytest.fixture
def overrides(tiny_model: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:  # noqa: F811
    monkeypatch.setenv("TRIETUNE_CACHE", str(tmp_path / "cache"))
    return {
        "model_name": str(tiny_model), "train_file": str(reviews / "train.tsv"),
        "validation_file": str(reviews / "dev.tsv"), "max_length": 128, "dtype": "float32", "batch_size": 8,
        "learning_rate": 1e-2, "max_steps": 8, "project_dir": str(tmp_path / "runs"), "use_wandb": False,
        "steps_freq": 4, "save_strategy": "step", "save_optim": True, "print_examples": False,
    }  # fmt: skip


def weights_of(run: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(run / "adapter" / "adapter_model.safetensors")


def difference(one: Path, other: Path) -> float:
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


def test_one_file_trains_on_both(device: Any, overrides: dict[str, Any]) -> None:
    there = train(load_config(None, {**overrides, "device": "xla", "wandb_run_name": "xla"}))
    here = train(load_config(None, {**overrides, "device": "cpu", "wandb_run_name": "cpu"}))
    assert there.after.keys() == here.after.keys()
    for name in here.after:
        assert there.after[name] == pytest.approx(here.after[name], rel=LOSS_TOLERANCE), name
    print(f"adapters differ by {difference(there.directory, here.directory):.1e}")
    assert difference(there.directory, here.directory) < WEIGHT_TOLERANCE
    steps = [json.loads(line) for line in (there.directory / "metrics.jsonl").read_text().splitlines()]
    losses = {event["step"]: event["train/loss"] for event in steps if event["event"] == "step"}
    assert losses[4] is not None
    assert all(event["num_compilations"] > 0 for event in steps if event["event"] == "step")


@pytest.mark.parametrize(("first", "second"), [("cpu", "xla"), ("xla", "cpu")])
def test_a_checkpoint_goes_on_on_the_other_device(
    device: Any, overrides: dict[str, Any], first: str, second: str, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = train(load_config(None, {**overrides, "device": "cpu", "wandb_run_name": "whole"}))
    begun = {**overrides, "wandb_run_name": f"{first}-{second}"}
    train(load_config(None, {**begun, "device": first, "max_steps": 4}))
    capfd.readouterr()
    resumed = train(load_config(None, {**begun, "device": second, "resume_from_checkpoint": True}))
    said = capfd.readouterr().err
    assert "machine.device" in said
    assert "not the same bits" in said
    assert resumed.step == 8
    print(f"{first} to {second}: adapters differ by {difference(resumed.directory, whole.directory):.1e}")
    assert difference(resumed.directory, whole.directory) < WEIGHT_TOLERANCE


def test_answers_are_those_of_the_cpu(device: Any, overrides: dict[str, Any], questions: Path) -> None:  # noqa: F811
    from trietune.run.opened import evaluate, open_model, predict
    from trietune.tracking.tracker import Tracker

    settings = {
        **overrides, "train_file": str(questions / "train.json"), "validation_file": str(questions / "dev.json"),
        "dataset_id": "squad_v2", "eval_batch_size": 4,
    }  # fmt: skip
    run = train(load_config(None, {**settings, "device": "xla", "wandb_run_name": "squad"}))
    measured = {
        kind: evaluate(run.directory, overrides={"device": kind, "eval_batch_size": 4}) for kind in ("xla", "cpu")
    }
    assert [p.text for p in measured["xla"].predictions] == [p.text for p in measured["cpu"].predictions]
    for name, value in measured["cpu"].metrics.items():
        assert measured["xla"].metrics[name] == pytest.approx(value, rel=LOSS_TOLERANCE), name
    asked = {"context": "the film was good", "question": "what was good?"}
    answers = [
        predict(open_model(run.directory, {"device": kind}, Tracker()), [asked], max_new_tokens=5)
        for kind in ("xla", "cpu")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lora_dropout": 0.1}, "a number in its program"),
        ({"batching": "padded"}, "plain rows have no static shape"),
        ({"optim": "sgd"}, "`optim: sgd` does not run on CPU through PJRT"),
    ],
)
def test_what_static_shapes_do_not_allow_is_refused_by_name(
    device: Any, overrides: dict[str, Any], change: dict[str, Any], text: str
) -> None:
    from trietune import UserError

    with pytest.raises(UserError) as caught:
        train(load_config(None, {**overrides, **change, "device": "xla"}))
    assert text in str(caught.value)
    assert caught.value.next_step
