"""Groups and the sampler: every sequence once an epoch, whole groups where they fit, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies import batches, flat, question_batch
from trietune.training.sampler import Sampler
from trietune.trie import make_micro_batches
from trietune.trie.groups import find_prefix_groups, grouped_order, shuffled_order


@given(batches(max_sequences=30), st.integers(1, 9), st.integers(0, 3))
def test_grouped_order_holds_every_sequence_once(
    batch: tuple[list[list[int]], list[list[int]]], batch_size: int, epoch: int
) -> None:
    sequences = flat(*batch)
    groups = find_prefix_groups(sequences, batch_size=batch_size)
    order = grouped_order(groups, batch_size=batch_size, seed=3, epoch=epoch)
    assert sorted(order.tolist()) == list(range(len(sequences)))
    assert np.all(np.diff(groups.start) >= 1)
    assert np.all(np.diff(groups.start)[:-1] <= max(batch_size, 1) + 4)


@pytest.mark.parametrize("is_grouped", [False, True])
def test_sampler_is_a_function_of_seed_epoch_and_number(is_grouped: bool) -> None:
    sequences = question_batch(np.random.default_rng(0), vocabulary=100, paragraphs=9, questions=5)
    groups = find_prefix_groups(sequences, batch_size=8) if is_grouped else None

    def sampler(seed: int = 5) -> Sampler:
        return Sampler(len(sequences), batch_size=8, seed=seed, groups=groups)

    first = sampler()
    all_of_epoch = np.concatenate([first.batch(1, b) for b in range(first.batches_per_epoch)])
    assert sorted(all_of_epoch.tolist()) == list(range(len(sequences)))
    assert all(len(first.batch(1, b)) == 8 for b in range(first.batches_per_epoch - 1))
    np.testing.assert_array_equal(sampler().batch(1, 3), first.batch(1, 3))
    assert not np.array_equal(first.batch(0, 0), first.batch(1, 0))
    assert not np.array_equal(sampler(6).batch(0, 0), first.batch(0, 0))


def test_grouping_computes_fewer_positions() -> None:
    sequences = question_batch(np.random.default_rng(0), vocabulary=100, paragraphs=40, questions=5, scale=4)
    size = 10
    groups = find_prefix_groups(sequences, batch_size=size)
    orders = {
        "grouped": grouped_order(groups, batch_size=size, seed=1, epoch=0),
        "shuffled": shuffled_order(len(sequences), seed=1, epoch=0),
    }
    positions = {
        name: sum(
            micro_batch.num_positions
            for first in range(0, len(order), size)
            for micro_batch in make_micro_batches(
                sequences, order[first : first + size], batching="trie", max_positions=10**6
            )
        )
        for name, order in orders.items()
    }
    assert positions["grouped"] < 0.5 * positions["shuffled"]
    assert positions["grouped"] < 1.35 * groups.num_distinct
