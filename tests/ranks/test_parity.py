"""Several processes train what one process trains: the same losses and the same adapter, up to rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model.families import FAMILIES
from ranks import jobs
from ranks.pool import Pool
from slow_cases import slow_but

# Sums are taken in another order, in fp64; Adam divides what rounding leaves of small gradients.
FP64_TOLERANCE = 1e-10
# Of the first step's loss and of one step's update by plain gradient descent, in fp32.
FP32_TOLERANCE = 1e-5


def difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Norm of the difference of all tensors over the norm of the reference."""
    assert ours.keys() == theirs.keys()
    square = sum(float(((ours[name] - theirs[name]) ** 2).sum()) for name in theirs)
    return float(np.sqrt(square / sum(float((tensor**2).sum()) for tensor in theirs.values())))


def check(pool: Pool, count: int, **how: Any) -> list[dict[str, Any]]:
    alone = jobs.train_family(**how)
    together = pool.run(count, jobs.train_family, **how)
    assert len({one["digest"] for one in together}) == 1, "replicas have drifted apart"
    assert difference(together[0]["adapter"], alone["adapter"]) < FP64_TOLERANCE
    np.testing.assert_allclose(together[0]["losses"], alone["losses"], rtol=FP64_TOLERANCE)
    assert [one[:2] for one in together[0]["counts"]] == [one[:2] for one in alone["counts"]]
    return together


@pytest.mark.parametrize("count", slow_but([2, 4], 2))
def test_an_adapter_after_30_steps_is_that_of_one_process(pool: Pool, count: int) -> None:
    together = check(pool, count)
    assert all(one["losses"] == together[0]["losses"] for one in together)


@pytest.mark.slow
def test_an_adapter_of_eight_processes_is_that_of_one() -> None:
    pool = Pool(8)
    try:
        check(pool, 8)
    finally:
        pool.close()


@pytest.mark.parametrize("family", ["gemma2", pytest.param("gemma3", marks=pytest.mark.slow), "qwen3"])
def test_families_train_alike(pool: Pool, family: str) -> None:
    check(pool, 3, family=family, num_steps=12)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_trains_alike(pool: Pool, family: str, count: int) -> None:
    check(pool, count, family=family)


def test_a_batch_of_3_on_4_processes_is_trained_whole(pool: Pool) -> None:
    check(pool, 4, batch_size=3, num_steps=12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {"batches_per_step": 3, "batch_size": 2},
        {"max_grad_norm": 0.05},
        {"batching": "padded"},
        {"batching": "packed"},
        {"optim": "sgd", "max_positions": 40},
        {"has_weights": True, "max_positions": 40, "batches_per_step": 2},
    ],
    ids=str,
)
def test_ways_to_train_stay_what_they_are(pool: Pool, how: dict[str, Any]) -> None:
    check(pool, 2, num_steps=12, **how)


def test_one_step_in_fp32_is_that_of_one_process(pool: Pool) -> None:
    how: dict[str, Any] = {"num_steps": 1, "optim": "sgd", "dtype": torch.float32, "batch_size": 12}
    alone = jobs.train_family(**how)
    together = pool.run(2, jobs.train_family, **how)
    assert difference(together[0]["adapter"], alone["adapter"]) < FP32_TOLERANCE


def test_dropout_differs_by_rank_and_repeats(pool: Pool) -> None:
    how: dict[str, Any] = {"num_steps": 4, "dropout": 0.3}
    first, again = (pool.run(2, jobs.train_family, **how) for _ in range(2))
    assert first[0]["digest"] == first[1]["digest"] == again[0]["digest"]
    assert first[0]["losses"] != jobs.train_family(**how)["losses"]


def test_memory_that_runs_out_on_one_rank_makes_all_cut_smaller(pool: Pool) -> None:
    how: dict[str, Any] = {"num_steps": 8, "batch_size": 12, "max_positions": 150}
    alone = jobs.train_family(**how)
    together = pool.run(3, jobs.train_family, runs_out_on=1, **how)
    assert all(one["cuts"] == together[0]["cuts"] for one in together)
    assert len(together[0]["cuts"]) == 1
    assert difference(together[0]["adapter"], alone["adapter"]) < FP64_TOLERANCE
    assert len({one["digest"] for one in together}) == 1


def test_a_wish_to_stop_reaches_all_with_the_step_in_which_it_came(pool: Pool) -> None:
    together = pool.run(3, jobs.train_family, num_steps=8, wants_stop_on=2)
    assert [len(one["losses"]) for one in together] == [3, 3, 3]
    assert [one["counts"][-1][3] for one in together] == [1.0, 1.0, 1.0]
