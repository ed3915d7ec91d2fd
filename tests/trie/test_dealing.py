"""Deals: every example once, no part larger than it must be, the same on every process, one process as it was."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import FlatSequences, batches, flat, question_batch
from trietune.trie import Batching, make_micro_batches, total_weight
from trietune.trie.dealing import Deal, SortedStep, cut_into_runs, deal_step
from trietune.trie.dealing import _sort as sort_step

Batch = tuple[list[list[int]], list[list[int]]]
BATCHINGS: list[Batching] = ["trie", "packed", "padded"]


def deal(sequences: FlatSequences, num_parts: int, *, batching: Batching = "trie", label_cost: float = 0.26) -> Deal:
    return deal_step(sequences, np.arange(len(sequences)), num_parts, batching=batching, label_cost=label_cost)


def nodes(sequences: FlatSequences, part: np.ndarray) -> int:
    micro_batches = make_micro_batches(sequences, part, batching="trie", max_positions=2**31)
    return sum(micro_batch.num_positions for micro_batch in micro_batches)


@settings(max_examples=40)
@given(batches(max_sequences=20), st.integers(1, 6), st.sampled_from(BATCHINGS))
def test_every_labeled_sequence_is_in_one_part(batch: Batch, num_parts: int, batching: Batching) -> None:
    sequences = flat(*batch)
    dealt = deal(sequences, num_parts, batching=batching)
    whole = make_micro_batches(sequences, np.arange(len(sequences)), batching=batching, max_positions=2**31)
    computed = sorted(np.concatenate([micro_batch.sequence_indices for micro_batch in whole] or [[]]).tolist())
    assert len(dealt.parts) == num_parts
    assert sorted(np.concatenate(dealt.parts).tolist()) == computed


@settings(max_examples=40)
@given(batches(max_sequences=20), st.integers(1, 6))
def test_the_labels_of_all_parts_are_the_divisor_of_one_process(batch: Batch, num_parts: int) -> None:
    sequences = flat(*batch)
    dealt = deal(sequences, num_parts)

    def weight(part: np.ndarray) -> float:
        return total_weight(make_micro_batches(sequences, part, batching="trie", max_positions=2**31))

    assert dealt.num_labels == weight(np.arange(len(sequences)))
    assert dealt.num_labels == sum(weight(part) for part in dealt.parts)


@settings(max_examples=40)
@given(batches(max_sequences=20), st.integers(1, 6))
def test_costs_are_those_of_the_tries(batch: Batch, num_parts: int) -> None:
    sequences = flat(*batch)
    dealt = deal(sequences, num_parts, label_cost=0.0)
    assert dealt.costs.tolist() == [nodes(sequences, part) for part in dealt.parts]
    assert dealt.cost_of_whole == nodes(sequences, np.arange(len(sequences)))


def best_largest_run(step: SortedStep, num_parts: int) -> float:
    """Of all ways to cut the sorted step, by trying each."""
    num = step.num_sequences
    cuts = itertools.combinations_with_replacement(range(num + 1), num_parts - 1)
    return min(
        max(step.cost(np.arange(a, b)) for a, b in itertools.pairwise([0, *ends, num])) for ends in cuts
    )  # fmt: skip


@settings(max_examples=40)
@given(batches(max_sequences=8), st.integers(1, 4), st.sampled_from([0.0, 0.26, 87.0]))
def test_no_cut_has_a_smaller_largest_run(batch: Batch, num_parts: int, label_cost: float) -> None:
    sequences = flat(*batch)
    step = sort_step(sequences, np.arange(len(sequences)), share=True, label_cost=label_cost)
    best = best_largest_run(step, num_parts)
    runs = cut_into_runs(step, num_parts)
    assert np.concatenate(runs).tolist() == list(range(step.num_sequences))
    assert max(step.cost(run) for run in runs) <= best * (1 + 1e-6)
    assert deal(sequences, num_parts, label_cost=label_cost).costs.max() <= best * (1 + 1e-6)


def test_many_small_groups_go_whole_and_one_large_group_is_cut() -> None:
    small = question_batch(np.random.default_rng(1), vocabulary=500, paragraphs=16, questions=2, scale=4)
    assert deal(small, 4).repeated < 0.05
    large = question_batch(np.random.default_rng(1), vocabulary=500, paragraphs=1, questions=24, scale=4)
    dealt = deal(large, 4)
    assert min(len(part) for part in dealt.parts) > 0
    assert dealt.speed_up > 2


def test_a_batch_smaller_than_the_parts_leaves_some_empty() -> None:
    dealt = deal(flat([[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[-100, 2, 3], [-100, 5, 6], [-100, 8, 9]]), 4)
    assert sorted(len(part) for part in dealt.parts) == [0, 1, 1, 1]
    assert dealt.num_labels == 6


@pytest.mark.parametrize("tokens", [[], [[1, 2]]], ids=["nothing", "no labels"])
def test_a_step_without_labels_has_empty_parts(tokens: list[list[int]]) -> None:
    dealt = deal(flat(tokens, [[-100] * len(t) for t in tokens]), 3)
    assert [part.tolist() for part in dealt.parts] == [[], [], []]
    assert dealt.num_labels == 0
    assert dealt.cost_of_whole == 0


def test_one_part_is_the_whole_step() -> None:
    sequences = question_batch(np.random.default_rng(2), vocabulary=50)
    dealt = deal(sequences, 1)
    assert dealt.imbalance == 1
    assert dealt.repeated == 0
    assert dealt.speed_up == 1
    assert dealt.costs[0] == dealt.cost_of_whole


def test_indices_may_come_in_any_order() -> None:
    sequences = question_batch(np.random.default_rng(3), vocabulary=50)
    order = np.random.default_rng(4).permutation(len(sequences))
    shuffled = deal_step(sequences, order, 3, batching="trie", label_cost=0.26)
    assert shuffled.costs.tolist() == pytest.approx(deal(sequences, 3).costs.tolist())
