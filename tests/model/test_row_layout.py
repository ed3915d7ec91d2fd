"""Blocks and buckets of rows: every node queries once and sees what the trie says, whatever the cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.trie_examples import trie_of
from strategies import FlatSequences, batches, flat
from trietune.model.attention.layout import visibility
from trietune.model.attention.row_blocks import AttentionCost, attention_cost, build_row_layout, cut_into_blocks
from trietune.trie import build_trie

HEADS, KEY_HEADS = 4, 2
# Bucket costs that make every cut the best one: a row each, a few rows, everything together.
COSTS = [AttentionCost(0.0, 0.0, 1.0), AttentionCost(50.0, 1.0, 0.1), AttentionCost(1e6, 1.0, 1e-9)]


@given(batches(), st.sampled_from([None, 1, 3]), st.integers(0, 2), st.randoms(use_true_random=False))
def test_each_query_sees_exactly_its_ancestors(
    batch: tuple[list[list[int]], list[list[int]]], window: int | None, which: int, random: object
) -> None:
    trie = trie_of(flat(*batch))
    if trie.num_nodes == 0:
        return
    keep = np.array([random.random() < 0.6 for _ in range(trie.num_nodes)])  # type: ignore[attr-defined]
    query_nodes = np.flatnonzero(keep) if keep.any() else np.arange(trie.num_nodes)
    layout = build_row_layout(
        trie,
        query_nodes,
        window=window,
        num_heads=HEADS,
        num_key_heads=KEY_HEADS,
        head_size=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
        cost=COSTS[which],
    )
    sees = visibility(trie, window)[query_nodes]
    outputs = []
    for bucket in layout.buckets:
        num_blocks, num_queries, num_keys = bucket.shape
        queries = bucket.query_rows.view(num_blocks, HEADS, num_queries).numpy()
        keys = bucket.key_rows.view(num_blocks, KEY_HEADS, num_keys).numpy()
        seen = bucket.bias.view(num_blocks, num_queries, num_keys).numpy() == 0
        for block in range(num_blocks):
            for at in range(num_queries):
                query = queries[block, 0, at] // HEADS
                assert (queries[block, :, at] == query * HEADS + np.arange(HEADS)).all()
                found = keys[block, 0, seen[block, at]] // KEY_HEADS
                assert len(set(found)) == len(found)
                assert set(found) == set(np.flatnonzero(sees[query]))
        outputs.append(queries.reshape(-1))
    laid_end_to_end = np.concatenate(outputs)
    assert (laid_end_to_end[layout.output_rows.numpy()] == np.arange(len(query_nodes) * HEADS)).all()


def questions(num_paragraphs: int, num_questions: int, paragraph: int, question: int) -> FlatSequences:
    rows = [
        [1 + p] * paragraph + [100 + q] * question + [7] for p in range(num_paragraphs) for q in range(num_questions)
    ]
    return flat(rows, [[-100] * (len(row) - 1) + [7] for row in rows])


def test_the_cut_follows_the_cost() -> None:
    batch = questions(2, 5, 20, 4)
    trie = build_trie(batch.input_ids, batch.labels, batch.offsets)
    every = np.arange(trie.num_nodes)
    rows, _ = cut_into_blocks(trie, every, None, COSTS[0])
    assert len(rows.num_queries) == trie.num_rows
    # What one paragraph's questions share is read once if a block costs more than the scores that it wastes.
    paragraphs, _ = cut_into_blocks(trie, every, None, AttentionCost(3000.0, 0.0, 1.0))
    assert paragraphs.num_queries.tolist() == [trie.num_nodes // 2] * 2
    batch = questions(1, 5, 20, 4)
    one = build_trie(batch.input_ids, batch.labels, batch.offsets)
    whole, _ = cut_into_blocks(one, np.arange(one.num_nodes), None, COSTS[2])
    assert whole.num_queries.tolist() == [one.num_nodes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 4, 30, 12), (4, 8, 150, 15), (32, 1, 20, 5), (3, 11, 40, 2)])
def test_no_cut_is_estimated_slower_than_rows_or_the_mask(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    batch = questions(*shape)
    trie = build_trie(batch.input_ids, batch.labels, batch.offsets)
    cost = attention_cost(num_heads=9, head_size=64, dtype=dtype)
    every = np.arange(trie.num_nodes)
    blocks, groups = cut_into_blocks(trie, every, None, cost)

    def estimate(queries: np.ndarray, keys: np.ndarray, buckets: list[np.ndarray]) -> float:
        return sum(float(cost.of(np.array(len(b)), queries[b].max(), keys[b].max())) for b in buckets)

    chosen = estimate(blocks.num_queries, blocks.num_keys, groups)
    if len(blocks.num_queries) == 1:
        chosen += cost.whole - cost.bucket
    mask = cost.whole + 2 * cost.gathered * trie.num_nodes + cost.score * trie.num_nodes**2
    rows = np.diff(trie.row_start), np.diff(trie.row_path_start)
    apart = estimate(*rows, [np.array([row]) for row in range(trie.num_rows)])
    assert chosen <= mask + 1e-6
    assert chosen <= apart + 1e-6
