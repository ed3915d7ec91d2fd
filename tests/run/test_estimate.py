"""What a run would take: from the data's tries and a device's figures, as a range, with what is not known left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trietune import load_config
from trietune.cli.app import main
from trietune.device.cpu import describe_cpu
from trietune.device.figures import CARDS, Speed, imagine, measured_speed, published_speed
from trietune.run.estimate import estimate_run
from trietune.run.prepare import prepare
from trietune.run.prepared import Prepared
from trietune.tracking.tracker import Tracker


def speed(**changed: Any) -> Speed:
    """A device whose products are all that takes time."""
    exact = Speed((1e9, 1e9), (1e18, 1e18), (0.0, 0.0), (1e18, 1e18), 1e10, "by hand", is_card=False)
    return replace(exact, **changed)


def prepared_for(overrides: dict[str, object], *, num_processes: int = 1, **changed: object) -> Prepared:
    settings = load_config(None, {**overrides, **changed})
    return prepare(settings, Tracker(), lambda: None, num_processes=num_processes)


def test_a_step_is_its_products_over_the_speed(overrides: dict[str, object]) -> None:
    # Every batch is the whole data, so that what is sampled is what is computed.
    prepared = prepared_for(overrides, batch_size=60, batching="packed", lora_dropout=0.0)
    found = estimate_run(prepared, speed(), 1)
    work, shape = prepared.work, prepared.shape
    head = 48 // 4
    flops = (
        work.num_positions * (4 * shape.num_in_layers + 6 * shape.num_trainable)
        + work.num_labels * 4 * shape.widths.vocabulary * 48
        + work.num_scores * 12 * 2 * 4 * head
    )
    assert found.flops_a_step == pytest.approx(flops)
    assert found.step == pytest.approx((flops / 1e9,) * 2, rel=1e-6)
    assert found.training[0] == pytest.approx(prepared.plan.num_steps * flops / 1e9, rel=1e-6)
    assert found.total[0] > found.training[0]


def test_what_is_shared_is_not_computed_twice(overrides: dict[str, object]) -> None:
    shared, packed = (
        estimate_run(prepared_for(overrides, batch_size=30, batching=batching), speed(), 1)
        for batching in ("trie", "packed")
    )
    assert shared.step[0] < 0.9 * packed.step[0]


def test_a_card_waits_for_the_larger_of_computing_and_starting(overrides: dict[str, object]) -> None:
    prepared = prepared_for(overrides, batch_size=60)
    started = speed(start_s=(1e-2, 1e-2), is_card=True)
    assert estimate_run(prepared, started, 1).step[0] == pytest.approx(110 * 2 * 1e-2, rel=0.01)
    on_host = replace(started, is_card=False)
    assert estimate_run(prepared, on_host, 1).step[0] > estimate_run(prepared, started, 1).step[0]


def test_processes_share_the_work_and_pay_for_their_message(overrides: dict[str, object]) -> None:
    alone = estimate_run(prepared_for(overrides, batch_size=30), speed(is_card=True), 1)
    prepared = prepared_for(overrides, num_processes=2, batch_size=30)
    together = estimate_run(prepared, speed(is_card=True), 2)
    assert 0.5 * alone.step[0] < together.step[0] < 0.75 * alone.step[0]
    slow = estimate_run(prepared, speed(is_card=True, exchange=(1e3, 1e3)), 2)
    assert slow.step[0] == pytest.approx(together.step[0] + 8 * prepared.shape.num_trainable / 1e3)
    assert slow.cost(3600.0)[0] == pytest.approx(2 * slow.total[0])


def test_objectives_are_scored_before_they_learn(overrides: dict[str, object]) -> None:
    plain = estimate_run(prepared_for(overrides, batch_size=30), speed(), 1)
    ranked = estimate_run(prepared_for(overrides, batch_size=30, objective="rank"), speed(), 1)
    assert ranked.step[0] > plain.step[0]
    assert ranked.reference == (0.0, 0.0)


def test_memory_that_does_not_suffice_is_said(overrides: dict[str, object]) -> None:
    prepared = prepared_for(overrides)
    assert estimate_run(prepared, speed(), 1).fits
    assert not estimate_run(prepared, speed(memory=1e8), 1).fits


def test_experts_are_given_no_time(overrides: dict[str, object]) -> None:
    prepared = prepared_for(overrides)
    prepared.shape.config.num_experts = 8
    found = estimate_run(prepared, speed(), 1)
    assert found.unknown is not None
    assert "mixture of experts" in found.unknown


@pytest.mark.parametrize("name", sorted(CARDS))
def test_cards_are_planned_for_without_being_there(name: str, overrides: dict[str, object]) -> None:
    device, card = imagine(name)
    settings = load_config(None, {**overrides, "dtype": "auto"})
    prepared = prepare(settings, Tracker(), lambda: None, device=device)
    assert prepared.plan.dtype == torch.bfloat16
    assert "imagined" in prepared.plan.device.name
    found = estimate_run(prepared, published_speed(card, torch.bfloat16), 1)
    assert 0 < found.step[0] < found.step[1] < 1


def test_this_machine_is_measured() -> None:
    found = measured_speed(describe_cpu(), torch.float32, rows=64, width_in=128, width_out=256, num_threads=2)
    assert 0 < found.flops[0] < found.flops[1]
    assert found.bandwidth[0] > 0
    assert "measured now" in found.source
    assert not found.is_card


def test_the_command_prints_time_memory_and_cost(
    overrides: dict[str, object], capfd: pytest.CaptureFixture[str]
) -> None:
    sets = [f"--set={key}={value}" for key, value in overrides.items()]
    assert main(["estimate", "--device", "h100", "--price", "2.5", *sets]) == 0
    out, _ = capfd.readouterr()
    for part in ("GB: fits", "by its data sheet", " for 6 steps", "EUR at 2.5 EUR an hour", "not counted"):
        assert part in out
    assert main(["estimate", "--device", "h100", "--nproc", "2", "--price", "2.5", "--json", *sets]) == 0
    found = json.loads(capfd.readouterr().out)["estimate"]
    assert found["num_processes"] == 2
    assert found["cost_eur"][0] == pytest.approx(found["total_seconds"][0] / 3600 * 2.5 * 2)
    assert main(["estimate", "--device", "tpu9", *sets]) == 2
    assert "h200|h100|a100|l4" in capfd.readouterr().err
    assert not Path(str(overrides["project_dir"])).exists()
