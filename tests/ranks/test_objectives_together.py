"""Objectives that compare answers of a whole step, learned by several processes: the result of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ranks import jobs
from ranks.pool import Pool
from ranks.test_parity import FP64_TOLERANCE, check, difference
from ranks.test_runs import ADAPTER_TOLERANCE, METRIC_TOLERANCE, adapter, differ

OBJECTIVES = ["dpo", "dpo, sft", "ipo", "simpo", "orpo", "kto", "rank"]


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_has_the_gradients_of_one_process(pool: Pool, objective: str) -> None:
    # Small micro-batches: a process has several, so that scores come from a pass of their own.
    together = check(pool, 3, objective=objective, num_steps=6, batch_size=5, max_positions=60)
    alone = jobs.train_family(objective=objective, num_steps=6, batch_size=5, max_positions=60)
    for ours, theirs in zip(together[0]["metrics"], alone["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=FP64_TOLERANCE)
    assert together[2]["metrics"] == together[0]["metrics"]


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_one_micro_batch_a_process_keeps_its_graph(pool: Pool, objective: str) -> None:
    check(pool, 2, objective=objective, num_steps=6, batch_size=5, max_positions=2000)


@pytest.mark.parametrize("objective", [pytest.param("dpo", marks=pytest.mark.slow), "rank"])
def test_a_step_of_less_rows_than_processes_is_learnt_whole(pool: Pool, objective: str) -> None:
    check(pool, 4, objective=objective, num_steps=6, batch_size=1, max_positions=60)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_after_30_steps(pool: Pool, objective: str, count: int) -> None:
    check(pool, count, objective=objective, batch_size=5, batches_per_step=2, max_grad_norm=0.5, max_positions=80)


@pytest.mark.slow
@pytest.mark.parametrize("max_positions", [60, 2000])
def test_memory_that_runs_out_while_scoring_makes_all_cut_smaller(pool: Pool, max_positions: int) -> None:
    how: dict[str, Any] = {"objective": "dpo", "num_steps": 5, "batch_size": 6, "max_positions": max_positions}
    alone = jobs.train_family(**how)
    together = pool.run(3, jobs.train_family, runs_out_on=1, **how)
    assert all(one["cuts"] == together[0]["cuts"] for one in together)
    assert len(together[0]["cuts"]) == 1
    assert difference(together[0]["adapter"], alone["adapter"]) < FP64_TOLERANCE
    assert len({one["digest"] for one in together}) == 1


def test_dropout_draws_the_same_in_both_passes_of_each_process(pool: Pool) -> None:
    how: dict[str, Any] = {"objective": "dpo", "num_steps": 3, "dropout": 0.3, "max_positions": 60}
    first, again = (pool.run(2, jobs.train_family, **how) for _ in range(2))
    assert first[0]["digest"] == first[1]["digest"] == again[0]["digest"]


def test_preferences_are_trained_and_measured_by_two_as_by_one(
    pool: Pool, overrides: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        f'{{"prompt": "the film is number {number}:", "chosen": " very good", "rejected": " {word} bad"}}'
        for number in range(12)
        for word in ("quite", "very")
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:18]) + "\n")
    (tmp_path / "dev.jsonl").write_text("\n".join(rows[18:]) + "\n")
    settings = {
        **overrides, "dataset_id": None, "train_file": str(tmp_path / "train.jsonl"), "batch_size": 4, "max_steps": 3,
        "validation_file": str(tmp_path / "dev.jsonl"), "objective": "dpo", "learning_rate": 1e-3,
    }  # fmt: skip
    alone = jobs.whole_run({**settings, "wandb_run_name": "alone"})
    assert alone["status"] == "finished", alone
    # The scores of the reference lie in the cache now: the first process would send those.
    monkeypatch.setenv("TRIETUNE_CACHE", str(tmp_path / "cache-of-two"))
    first, second = pool.run(2, jobs.whole_run, settings)
    assert first["status"] == second["status"] == "finished", (first, second)
    assert differ(adapter(first), adapter(alone)) < ADAPTER_TOLERANCE
    assert "eval/preference_accuracy" in first["after"]
    for when in ("before", "after"):
        assert first[when] == second[when]
        assert first[when] == pytest.approx(alone[when], rel=METRIC_TOLERANCE, abs=1e-6)
    assert "2 processes; each computes its part of 4 examples" in first["plan"]["processes"]
