"""Files of a checkpoint whose digests are right and whose contents mean nothing: refused by name, with exit code 6."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trietune.errors import UserError
from trietune.run.resuming import parse_state
from trietune.training.state import optimizer_tensors, restore_optimizer

STATE = {"step": 4, "epoch": 0.5, "has_optimizer": True, "num_warmup_steps": 0, "max_positions": 512}


@pytest.mark.parametrize(
    "changed",
    [[], {}, {**STATE, "epoch": "x"}, {**STATE, "epoch": None}, {**STATE, "max_positions": 0},
     {**STATE, "num_warmup_steps": -1}, {**STATE, "packed_bytes": "1"}, {**STATE, "loss_scale": [1]}],
)  # fmt: skip
def test_a_trainers_state_of_other_kinds_is_refused(changed: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer_state\.json") as refused:
        parse_state(json.dumps(changed).encode(), tmp_path / "step-00000004")
    assert refused.value.exit_code == 6


def test_a_trainers_state_as_it_is_written_is_read(tmp_path: Path) -> None:
    assert parse_state(json.dumps(STATE).encode(), tmp_path) == STATE


def stepped() -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("fault", ["a name", "a shape", "not finite", "negative", "one lacks a value", "all lack one"])
def test_an_optimizers_state_that_does_not_fit_is_refused_and_nothing_is_restored(fault: str) -> None:
    named = {name: tensor.clone() for name, tensor in optimizer_tensors(stepped()).items()}
    match fault:
        case "a name":
            named["weights"] = torch.ones(1)
        case "a shape":
            named["state.0.exp_avg"] = torch.ones(5)
        case "not finite":
            named["state.0.exp_avg"][0, 0] = torch.nan
        case "negative":
            named["state.1.exp_avg_sq"][0] = -1
        case "one lacks a value":
            del named["state.1.exp_avg"]
        case _:
            del named["state.0.exp_avg"], named["state.1.exp_avg"]
    optimizer = stepped()
    before = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
    with pytest.raises(ValueError):
        restore_optimizer(optimizer, named)
    after = optimizer_tensors(optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before)
