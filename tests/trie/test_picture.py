"""The picture of a batch tiles its trie: every node in one segment, every example a chain of them."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trietune.trie.picture import Segment, label_runs, picture_batch
from trietune.trie.trie import IGNORED_LABEL, build_trie


def flat(
    sequences: list[list[int]], labels: list[list[int]] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in sequences])]).astype(np.int64)
    ids = np.array([token for one in sequences for token in one], np.int32)
    marked = ids.copy() if labels is None else np.array([label for one in labels for label in one], np.int32)
    return ids, marked, offsets


def test_the_example_of_the_module() -> None:
    none = IGNORED_LABEL
    ids, labels, offsets = flat([[5, 6, 7, 1], [5, 6, 9, 1]], [[none, none, 7, 1], [none, none, 9, 1]])
    picture = picture_batch(ids, labels, offsets)
    assert picture.segments == [Segment(0, 2, 0, 2), Segment(0, 1, 2, 3), Segment(1, 2, 2, 3)]
    assert (picture.num_padded, picture.num_real, picture.num_distinct) == (6, 6, 4)
    assert label_runs(labels, 0, 4) == [(2, 4)]


def test_nothing_is_drawn_of_nothing() -> None:
    picture = picture_batch(*flat([]))
    assert (picture.segments, picture.num_padded) == ([], 0)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8))
@settings(deadline=None, max_examples=200)
def test_segments_are_the_nodes_of_the_trie(sequences: list[list[int]]) -> None:
    ids, labels, offsets = flat(sequences)
    picture = picture_batch(ids, labels, offsets)
    assert picture.num_distinct == build_trie(ids, labels, offsets).num_nodes
    # Along each drawn example, its segments are its tokens from the first to the last, in order.
    for place, length in enumerate(picture.lengths):
        mine = [segment for segment in picture.segments if segment.first <= place < segment.last]
        assert [segment.depth for segment in mine] == [0, *(segment.end for segment in mine[:-1])]
        assert mine[-1].end == length
        tokens = sequences[picture.order[place]]
        for segment in mine:
            other = sequences[picture.order[segment.first]]
            assert other[segment.depth : segment.end] == tokens[segment.depth : segment.end]
    without = picture_batch(ids, labels, offsets, share=False)
    assert without.num_distinct == without.num_real == picture.num_real
