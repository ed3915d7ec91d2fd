"""Shapes are few and pad little; what is padded means what it meant before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import flat, question_batch
from trietune.trie import make_micro_batches, total_weight
from trietune.trie.static_shapes import (
    ACCEPTED_WASTE,
    MOST_SHAPES,
    StaticShape,
    StaticShapes,
    choose_shapes,
    rounded_length,
)


def batch(seed: int) -> list:
    sequences = question_batch(np.random.default_rng(seed), vocabulary=120)
    return make_micro_batches(sequences, np.arange(len(sequences)), batching="trie", max_positions=40)


def test_one_length_needs_one_shape() -> None:
    shapes = choose_shapes([(250, 40), (256, 30)], longest=100, deepest=99)
    assert shapes.shapes == (StaticShape(256, 64),)


def test_lengths_far_apart_get_shapes_of_their_own() -> None:
    shapes = choose_shapes([(60, 10)] * 20 + [(1000, 100)] * 20, longest=60, deepest=59)
    assert [shape.num_positions for shape in shapes.shapes] == [64, 1024]


def test_the_largest_shape_holds_the_longest_sequence() -> None:
    assert choose_shapes([(60, 10)], longest=700, deepest=699).max_positions == 768


@given(st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 300)), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_chosen_shapes_hold_every_size_and_pad_as_little_as_they_may(sizes: list[tuple[int, int]]) -> None:
    shapes = choose_shapes(sizes, longest=1, deepest=9)
    assert list(shapes.shapes) == sorted(shapes.shapes)
    assert len(shapes.shapes) <= MOST_SHAPES
    held = [shapes.holding(*size) for size in sizes]
    assert all(s.num_positions >= n and s.num_labels >= m for s, (n, m) in zip(held, sizes, strict=True))
    assert {shape.num_positions % 32 for shape in shapes.shapes} == {0}
    if len(shapes.shapes) < MOST_SHAPES:
        by_length = [min(x.num_positions for x in shapes.shapes if x.num_positions >= n) for n, _ in sizes]
        unavoidable = sum(rounded_length(n) for n, _ in sizes)
        assert sum(by_length) <= max((1 + ACCEPTED_WASTE) * sum(n for n, _ in sizes), unavoidable)


def test_what_no_shape_holds_gets_one_of_few_beside_the_list() -> None:
    shapes = StaticShapes((StaticShape(64, 32), StaticShape(128, 32)), deepest=50)
    assert shapes.holding(60, 33) == StaticShape(64, 64)
    assert {shapes.holding(n, 200) for n in range(129, 257)} == {StaticShape(256, 256)}


@pytest.mark.parametrize("num_rows", [1, 2, 4])
def test_padding_changes_no_count_and_no_label(num_rows: int) -> None:
    micro_batches = batch(3)
    shapes = choose_shapes(
        [(mb.num_positions, len(mb.labels)) for mb in micro_batches], longest=1, deepest=99, num_rows=num_rows
    )
    arranged = shapes.pad_to_shapes(micro_batches)
    assert len(arranged) == -(-len(micro_batches) // num_rows)
    assert total_weight(arranged) == total_weight(micro_batches)
    assert sum(mb.num_tokens for mb in arranged) == sum(mb.num_tokens for mb in micro_batches)
    assert all(mb.input_ids.shape[0] == num_rows for mb in arranged)
    drawn = np.concatenate([mb.sequence_indices for mb in arranged])
    assert sorted(drawn) == sorted(np.concatenate([mb.sequence_indices for mb in micro_batches]))
    assert labels_of(arranged) == labels_of(micro_batches)


def labels_of(micro_batches: list) -> list:
    """(sequence, predicting depth, token before, label) of every label, sorted."""
    found = []
    for mb in micro_batches:
        index = mb.label_index[mb.pair_of_label]
        found += zip(
            mb.sequence_indices[mb.sequence_of_label].tolist(),
            mb.position_ids.ravel()[index].tolist(),
            mb.input_ids.ravel()[index].tolist(),
            mb.labels[mb.pair_of_label].tolist(),
            strict=True,
        )
    return sorted(found)


def test_padding_nodes_see_themselves_alone() -> None:
    micro_batches = batch(3)[:3]
    shapes = StaticShapes((StaticShape(64, 64),), deepest=99, num_rows=2)
    last = shapes.pad_to_shapes(micro_batches)[-1]  # one trie beside a row of padding
    trie = last.trie
    assert trie.num_nodes == 128
    padding = np.arange(64, 128)
    assert (trie.subtree_end[padding] == padding + 1).all()
    assert (trie.subtree_end[:64] <= 64).all()
    paths = np.split(trie.row_path, trie.row_path_start[1:-1])
    assert [len(path) for path in paths[-64:]] == [1] * 64
    assert (np.diff(trie.row_start) > 0).all()


def test_padded_rows_are_refused() -> None:
    sequences = flat([[1, 2, 3]], [[-100, 2, 3]])
    rows = make_micro_batches(sequences, np.arange(1), batching="padded", max_positions=9)
    with pytest.raises(ValueError, match="no static shape"):
        StaticShapes((StaticShape(64, 32),), deepest=9).pad_to_shapes(rows)
