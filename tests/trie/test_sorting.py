"""Sorting range by range gives what one sort of everything gives, with memory for a part of the tokens."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import IGNORED, batches, flat
from trietune.trie import common_prefix_lengths, num_nodes_alone, sort_sequences, sorting
from trietune.trie.sorting import sort_all


@given(batches(max_sequences=30), st.integers(1, 40), st.integers(1, 3))
@settings(max_examples=200)
def test_ranges_give_the_order_of_one_sort(
    batch: tuple[list[list[int]], list[list[int]]], tokens_at_once: int, sampled: int
) -> None:
    sequences = flat(*batch)
    lengths = num_nodes_alone(sequences.labels, sequences.offsets)
    order = sort_sequences(sequences.input_ids, sequences.offsets[:-1], lengths)
    shared = common_prefix_lengths(sequences.input_ids, sequences.offsets[:-1][order], lengths[order])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorting, "TOKENS_AT_ONCE", tokens_at_once)
        patch.setattr(sorting, "SAMPLED_PER_RANGE", sampled)
        found_order, found_lengths, found_shared = sort_all(sequences)
    np.testing.assert_array_equal(found_order, order)
    np.testing.assert_array_equal(found_lengths, lengths[order])
    np.testing.assert_array_equal(found_shared, shared)


def test_memory_does_not_grow_with_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "TOKENS_AT_ONCE", 20_000)
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 50, (4000, 100)).astype(np.int32)
    sequences = flat(tokens.tolist(), [[IGNORED] * 99 + [1]] * len(tokens))
    tracemalloc.start()
    sort_all(sequences)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Keys of everything at once would take 4 bytes a token, and the tables of positions several times that.
    assert peak < 4 * tokens.size


def test_no_sequences_give_an_empty_order() -> None:
    assert [len(part) for part in sort_all(flat([], []))] == [0, 0, 0]
