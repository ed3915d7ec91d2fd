"""A run on a device of static shapes, acted by the processor: everything but XLA itself, where XLA is not installed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trietune import UserError, load_config, train
from trietune.device import Device
from trietune.device.cpu import describe_cpu

# fp32, summed in another order.
TOLERANCE = 1e-4


def static_cpu(**changes: Any) -> Device:
    return replace(
        describe_cpu(),
        name="static CPU",
        attentions=("mask",),
        has_static_shapes=True,
        runs_own_backwards=False,
        reads_every_step=False,
        optimizers=("adamw", "adamw_torch"),
        **changes,
    )


@pytest.fixture
def static(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trietune.run.opening.choose_device", lambda *_, **__: static_cpu())


def adapter_of(run: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(run / "adapter" / "adapter_model.safetensors")


def difference(one: Path, other: Path) -> float:
    ours, theirs = adapter_of(one), adapter_of(other)
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_static_run_learns_the_same(
    overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    changed = {**overrides, "steps_freq": 3, "max_steps": 8, "val_steps_freq": 5}
    plain = train(load_config(None, {**changed, "wandb_run_name": "plain"}))
    monkeypatch.setattr("trietune.run.opening.choose_device", lambda *_, **__: static_cpu(num_rows=num_rows))
    static = train(load_config(None, {**changed, "wandb_run_name": "static"}))
    assert difference(static.directory, plain.directory) < TOLERANCE
    for name in plain.after:
        assert static.after[name] == pytest.approx(plain.after[name], rel=TOLERANCE)
    lines = [json.loads(line) for line in (static.directory / "metrics.jsonl").read_text().splitlines()]
    read = {event["step"]: event["train/loss"] is not None for event in lines if event["event"] == "step"}
    # Every third, the first and the last are reported; the fifth is validated, and the epoch's last is saved.
    assert {step for step, is_read in read.items() if is_read} >= {1, 3, 6, 8}
    assert not all(read.values()) or set(read) == {1, 3, 6, 8}
    plan = dict(next(event["plan"] for event in lines if event["event"] == "start"))
    assert "padding adds" in plan["shapes"]


def test_answers_come_without_a_cache(
    overrides: dict[str, Any], questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trietune.run.opened import evaluate

    changed = {
        **overrides, "train_file": str(questions / "train.json"), "validation_file": str(questions / "dev.json"),
        "dataset_id": "squad_v2", "eval_batch_size": 4,
    }  # fmt: skip
    run = train(load_config(None, {**changed, "wandb_run_name": "questions"}))
    plain = evaluate(run.directory, overrides={"eval_batch_size": 4})
    monkeypatch.setattr("trietune.run.opening.choose_device", lambda *_, **__: static_cpu())
    static = evaluate(run.directory, overrides={"eval_batch_size": 4})
    assert [p.text for p in static.predictions] == [p.text for p in plain.predictions]
    for name, value in plain.metrics.items():
        assert static.metrics[name] == pytest.approx(value, rel=TOLERANCE)


@pytest.mark.usefixtures("static")
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lora_dropout": 0.1}, "a number in its program"),
        ({"batching": "padded"}, "plain rows have no static shape"),
        ({"optim": "sgd"}, "`optim: sgd` does not run on static CPU"),
    ],
)
def test_what_static_shapes_do_not_allow_is_refused_by_name(
    overrides: dict[str, Any], change: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError) as caught:
        train(load_config(None, {**overrides, **change}))
    assert text in caught.value.what


@pytest.mark.usefixtures("static")
def test_a_loss_that_is_not_finite_is_found_when_it_is_read(overrides: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        train(
            load_config(None, {**overrides, "learning_rate": 10, "steps_freq": 6, "max_steps": 6, "weight_decay": 1e30})
        )
    assert "is not finite" in caught.value.what
    assert caught.value.exit_code == 5


def test_several_devices_are_refused_where_there_is_one(overrides: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        train(load_config(None, {**overrides, "mesh_shape": "8,1"}))
    assert caught.value.what.startswith("`mesh_shape` asks for several devices, and this run is on one: CPU")


def test_options_of_another_device_are_said_and_left(overrides: dict[str, Any]) -> None:
    run = train(load_config(None, {**overrides, "enable_trace": True, "max_steps": 1}))
    text = (run.directory / "metrics.jsonl").read_text()
    assert "`enable_trace`: of no effect on CPU" in text
