"""The laws of a trie: every prefix once, ancestors alone are seen, labels and weights add up, nothing is lost."""

from __future__ import annotations

from collections import Counter

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import IGNORED, batches, flat
from trietune.trie import (
    Trie,
    build_trie,
    common_prefix_lengths,
    make_micro_batches,
    num_nodes_alone,
    pad_trie,
    sort_sequences,
)

Batch = tuple[list[list[int]], list[list[int]]]


def build(batch: Batch, *, share: bool = True) -> Trie:
    sequences = flat(*batch)
    return build_trie(sequences.input_ids, sequences.labels, sequences.offsets, share=share)


def computed(tokens: list[int], labels: list[int]) -> int:
    """Positions that a plain row needs: up to the one that predicts the last label."""
    return max((at for at in range(1, len(tokens)) if labels[at] != IGNORED), default=0)


def parents(trie: Trie) -> np.ndarray:
    """The node above each node, -1 for roots, read off the rows' paths."""
    parent = np.full(trie.num_nodes, -1)
    for row in range(trie.num_rows):
        path = trie.row_path[trie.row_path_start[row] : trie.row_path_start[row + 1]]
        parent[path[1:]] = path[:-1]
    return parent


def prefix_of(trie: Trie, node: int, parent: np.ndarray) -> tuple[int, ...]:
    tokens = []
    while node != -1:
        tokens.append(int(trie.input_ids[node]))
        node = int(parent[node])
    return tuple(tokens[::-1])


@given(batches(), st.integers(0, 9))
def test_padding_sees_and_is_seen_by_itself_alone(batch: Batch, extra: int) -> None:
    trie = build(batch)
    padded = pad_trie(trie, trie.num_nodes + extra)
    node = np.arange(padded.num_nodes)
    sees = (node[None] <= node[:, None]) & (node[:, None] < padded.subtree_end[None])
    assert not sees[: trie.num_nodes, trie.num_nodes :].any()
    assert not sees[trie.num_nodes :, : trie.num_nodes].any()
    assert sees[node, node].all()
    assert padded.num_rows == trie.num_rows + (extra > 0)
    assert (padded.input_ids[: trie.num_nodes] == trie.input_ids).all()
    assert padded.labels is trie.labels
    assert padded.row_path_start[-1] == len(padded.row_path)
    assert pad_trie(trie, 0) is trie


def test_the_example_of_the_module() -> None:
    trie = build(([[5, 6, 7, 1], [5, 6, 9, 1]], [[IGNORED, IGNORED, 7, 1], [IGNORED, IGNORED, 9, 1]]))
    assert trie.input_ids.tolist() == [5, 6, 7, 9]
    assert trie.position_ids.tolist() == [0, 1, 2, 2]
    assert trie.subtree_end.tolist() == [4, 4, 3, 4]
    assert trie.row_start.tolist() == [0, 3, 4]
    assert trie.row_path.tolist() == [0, 1, 2, 0, 1, 3]
    assert trie.label_index.tolist() == [1, 1, 2, 3]
    assert trie.labels.tolist() == [7, 9, 1, 1]
    assert trie.label_weight.tolist() == [1, 1, 1, 1]


@given(batches())
def test_every_prefix_is_computed_once(batch: Batch) -> None:
    trie = build(batch)
    prefixes = {tuple(t[: d + 1]) for t, labels in zip(*batch, strict=True) for d in range(computed(t, labels))}
    parent = parents(trie)
    found = [prefix_of(trie, node, parent) for node in range(trie.num_nodes)]
    assert len(found) == len(set(found))
    assert set(found) == prefixes
    assert [len(prefix) - 1 for prefix in found] == trie.position_ids.tolist()


@given(batches(), st.booleans())
def test_ancestors_and_only_they_are_seen(batch: Batch, share: bool) -> None:
    trie = build(batch, share=share)
    parent = parents(trie)
    for node in range(trie.num_nodes):
        ancestors, above = set(), node
        while above != -1:
            ancestors.add(above)
            above = int(parent[above])
        assert ancestors == {j for j in range(trie.num_nodes) if j <= node < trie.subtree_end[j]}


@given(batches())
def test_labels_follow_their_prefixes_and_weights_add_up(batch: Batch) -> None:
    trie = build(batch)
    expected = Counter(
        (tuple(tokens[:at]), labels[at])
        for tokens, labels in zip(*batch, strict=True)
        for at in range(1, len(tokens))
        if labels[at] != IGNORED
    )
    parent = parents(trie)
    found = {
        (prefix_of(trie, int(node), parent), int(label)): weight
        for node, label, weight in zip(trie.label_index, trie.labels, trie.label_weight, strict=True)
    }
    assert found == dict(expected)


@given(batches(), st.booleans())
def test_every_example_comes_back_with_its_tokens_and_labels(batch: Batch, share: bool) -> None:
    trie = build(batch, share=share)
    parent = parents(trie)
    for number, (tokens, labels) in enumerate(zip(*batch, strict=True)):
        pairs = trie.pair_of_label[trie.sequence_of_label == number]
        found = sorted(
            (*prefix_of(trie, int(trie.label_index[pair]), parent), int(trie.labels[pair])) for pair in pairs
        )
        expected = sorted((*tokens[:at], labels[at]) for at in range(1, len(tokens)) if labels[at] != IGNORED)
        assert found == expected


@given(batches(max_sequences=14), st.integers(1, 30), st.sampled_from(["trie", "packed", "padded"]))
@settings(max_examples=150)
def test_micro_batches_hold_every_label_once_within_the_bound(batch: Batch, max_positions: int, batching: str) -> None:
    sequences = flat(*batch)
    micro_batches = make_micro_batches(
        sequences,
        np.arange(len(sequences)),
        batching=batching,
        max_positions=max_positions,  # type: ignore[arg-type]
    )
    num_labels = Counter(
        number
        for number, (tokens, labels) in enumerate(zip(*batch, strict=True))
        for at in range(1, len(tokens))
        if labels[at] != IGNORED
    )
    found: Counter[int] = Counter()
    for micro_batch in micro_batches:
        found.update(micro_batch.sequence_indices[micro_batch.sequence_of_label].tolist())
        assert micro_batch.num_positions <= max_positions or len(micro_batch.sequence_indices) == 1
    assert found == num_labels
    assert sum(micro_batch.total_weight for micro_batch in micro_batches) == sum(num_labels.values())


@given(batches(max_sequences=14), st.integers(1, 30))
@settings(max_examples=150)
def test_no_choice_of_cuts_computes_less(batch: Batch, max_positions: int) -> None:
    from trietune.trie.batching import NODES_WORTH_A_MICRO_BATCH

    sequences = flat(*batch)
    lengths = num_nodes_alone(sequences.labels, sequences.offsets)
    kept = np.flatnonzero(lengths > 0)
    order = kept[sort_sequences(sequences.input_ids, sequences.offsets[kept], lengths[kept])]
    lengths = lengths[order]
    shared = common_prefix_lengths(sequences.input_ids, sequences.offsets[:-1][order], lengths)

    def cost(pieces: list[tuple[int, int]]) -> float:
        nodes = [int(lengths[a] + (lengths - shared)[a + 1 : b].sum()) for a, b in pieces]
        if any(n > max_positions and b - a > 1 for n, (a, b) in zip(nodes, pieces, strict=True)):
            return float("inf")
        return sum(nodes) + NODES_WORTH_A_MICRO_BATCH * len(pieces)

    best = [0.0]
    for end in range(1, len(order) + 1):
        best.append(min(best[first] + cost([(first, end)]) for first in range(end)))
    found = make_micro_batches(sequences, np.arange(len(sequences)), batching="trie", max_positions=max_positions)
    total = sum(micro_batch.num_positions for micro_batch in found) + NODES_WORTH_A_MICRO_BATCH * len(found)
    assert total == best[-1]


def test_ten_thousand_examples_make_one_trie() -> None:
    generator = np.random.default_rng(1)
    stems = [generator.integers(0, 500, 40).tolist() for _ in range(50)]
    tokens = [stems[i % 50][: 5 + i % 36] + generator.integers(0, 500, 4).tolist() for i in range(10_000)]
    sequences = flat(tokens, [[IGNORED] * (len(t) - 3) + t[-3:] for t in tokens])
    trie = build_trie(sequences.input_ids, sequences.labels, sequences.offsets)
    assert trie.num_nodes == len({tuple(t[: d + 1]) for t in tokens for d in range(len(t) - 1)})
    assert trie.label_weight.sum() == 30_000


def test_paths_are_found_in_blocks_of_any_size(monkeypatch: object) -> None:
    from trietune.trie import trie as module

    generator = np.random.default_rng(2)
    tokens = [generator.integers(0, 3, generator.integers(1, 20)).tolist() for _ in range(30)]
    sequences = flat(tokens, tokens)
    whole = build_trie(sequences.input_ids, sequences.labels, sequences.offsets)
    monkeypatch.setattr(module, "MAX_TABLE_CELLS", 30)  # type: ignore[attr-defined]
    in_blocks = build_trie(sequences.input_ids, sequences.labels, sequences.offsets)
    for name in ("subtree_end", "row_path", "label_index", "labels"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(in_blocks, name))


def test_shapes_in_annotations_are_checked() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        build_trie(np.zeros(3, np.int64), np.zeros(3, np.int32), np.array([0, 3]))
    with pytest.raises(jaxtyping.TypeCheckError):
        build_trie(np.zeros(3, np.int32), np.zeros(4, np.int32), np.array([0, 3]))
