"""Runs of a trie as sequences of a variable-length kernel, whose contract a stand-in keeps on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.varlen import varlen_attn

from model.flash_on_cpu import flash_on_cpu
from model.trie_examples import dense_attention, largest_difference, random_nodes, trie_of
from strategies import IGNORED, batches, flat, question_batch
from trietune.model.attention.attend import attend
from trietune.model.attention.layout import TrieLayout, visibility
from trietune.model.attention.varlen import VarlenAttention, build_varlen_layout
from trietune.trie import Trie

CPU = torch.device("cpu")
# Sums of a few dozen products, in another order.
FP64_TOLERANCE = 1e-13


def two_sequences() -> Trie:
    """Those of the module's picture: 5 6 7 1 and 5 6 9 1."""
    return trie_of(flat([[5, 6, 7, 1], [5, 6, 9, 1]], [[IGNORED, IGNORED, 7, 1], [IGNORED, IGNORED, 9, 1]]))


def test_runs_of_two_sequences() -> None:
    layout = build_varlen_layout(two_sequences(), window=None)
    assert layout.query_start.tolist() == [0, 3, 4]
    assert layout.key_start.tolist() == [0, 3, 6]
    assert layout.key_nodes.tolist() == [0, 1, 2, 0, 1, 3]
    assert (layout.max_queries, layout.max_keys, layout.window) == (3, 3, -1)


def test_a_window_leaves_out_keys_that_no_query_of_the_run_sees() -> None:
    layout = build_varlen_layout(two_sequences(), window=2)
    assert layout.key_nodes.tolist() == [0, 1, 2, 1, 3]
    assert layout.window == 1  # positions before the query itself


def test_a_gap_between_queries_begins_another_run() -> None:
    sequence = list(range(2, 12))
    trie = trie_of(flat([sequence], [sequence]))
    layout = build_varlen_layout(trie, np.array([1, 2, 5, 6, 7]), window=None)
    assert layout.query_start.tolist() == [0, 2, 5]
    assert layout.key_start.tolist() == [0, 3, 11]
    assert layout.key_nodes.tolist() == [*range(3), *range(8)]


def test_single_queries_are_not_announced_as_such() -> None:
    """With `max_q = 1` the kernel swaps heads and queries, as for decoding, and that has no backward."""
    layout = build_varlen_layout(two_sequences(), np.array([1, 3]), window=None)
    assert layout.query_start.diff().tolist() == [1, 1]
    assert layout.max_queries == 2


@settings(deadline=None, max_examples=60)
@given(batches(), st.one_of(st.none(), st.integers(1, 6)), st.data())
def test_queries_see_their_ancestors_and_nothing_else(
    batch: tuple[list[list[int]], list[list[int]]], window: int | None, data: st.DataObject
) -> None:
    trie = trie_of(flat(*batch))
    if not trie.num_nodes:
        return
    query_nodes = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=trie.num_nodes, max_size=trie.num_nodes)))
    if not len(query_nodes):
        query_nodes = np.arange(trie.num_nodes)
    layout = build_varlen_layout(trie, query_nodes, window=window)
    seen = np.zeros((len(query_nodes), trie.num_nodes), bool)
    queries, keys = layout.query_start.tolist(), layout.key_start.tolist()
    for q, q_end, k, k_end in zip(queries[:-1], queries[1:], keys[:-1], keys[1:], strict=True):
        for i in range(q, q_end):
            at = k_end - q_end + i  # the last query is at the last key
            first = k if layout.window < 0 else max(k, at - layout.window)
            seen[i, layout.key_nodes[first : at + 1]] = True
    np.testing.assert_array_equal(seen, visibility(trie, window)[query_nodes])


@settings(deadline=None, max_examples=25)
@given(
    batches(max_length=12),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.one_of(st.none(), st.integers(1, 6)),
    st.booleans(),
    st.integers(0, 100),
)
def test_outputs_and_gradients_are_those_of_the_mask(
    batch: tuple[list[list[int]], list[list[int]]], heads: tuple[int, int], window: int | None, prunes: bool, seed: int
) -> None:
    trie = trie_of(flat(*batch))
    if not trie.num_nodes:
        return
    needed = np.unique(trie.label_index).astype(np.int64)
    query_nodes = needed if prunes else None
    inputs = random_nodes(
        trie.num_nodes,
        len(needed) if prunes else trie.num_nodes,
        heads=heads,
        head_size=8,
        dtype=torch.float64,
        seed=seed,
    )
    layout = TrieLayout(
        trie,
        kind="varlen",
        num_heads=heads[0],
        num_key_heads=heads[1],
        device=CPU,
        query_nodes=needed if prunes else None,
    )
    with flash_on_cpu():
        ours = attend(*inputs, layout, window=window, scale=0.3, softcap=None, is_pruned=prunes)
        expected = dense_attention(*inputs, trie, window=window, scale=0.3, query_nodes=query_nodes)
        difference = largest_difference(ours, expected, inputs)
    assert difference < FP64_TOLERANCE, f"{difference:.1e}"


@pytest.mark.parametrize(("window", "told"), [(None, (-1, 0)), (3, (2, 0)), (1, (0, 0))])
def test_the_kernel_is_called_as_the_library_calls_it(window: int | None, told: tuple[int, int]) -> None:
    """The same operator with the same arguments as `varlen_attn`, so that its promises are ours."""
    trie = trie_of(question_batch(np.random.default_rng(1), vocabulary=50))
    query, key, value = random_nodes(
        trie.num_nodes, trie.num_nodes, heads=(4, 2), head_size=8, dtype=torch.float64, seed=0
    )
    layout = build_varlen_layout(trie, window=window)
    with flash_on_cpu() as calls:
        ours = VarlenAttention.apply(query, key, value, layout, 0.3)
        theirs = varlen_attn(
            query,
            key[layout.key_nodes],
            value[layout.key_nodes],
            layout.query_start,
            layout.key_start,
            layout.max_queries,
            layout.max_keys,
            scale=0.3,
            window_size=told,
            enable_gqa=True,
        )
    mine, library = ({k: v for k, v in call.items() if not torch.is_tensor(v) and v is not None} for call in calls)
    assert mine == library
    assert torch.equal(ours, theirs)


def test_keys_and_values_are_gathered_again_not_kept() -> None:
    trie = trie_of(question_batch(np.random.default_rng(1), vocabulary=50, scale=4))
    inputs = random_nodes(trie.num_nodes, trie.num_nodes, heads=(4, 2), head_size=8, dtype=torch.float64)
    layout = build_varlen_layout(trie, window=None)
    kept: list[int] = []
    with (
        flash_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor.shape[0]), tensor)[1], lambda t: t),
    ):
        VarlenAttention.apply(*inputs, layout, 0.3)
    num_gathered = len(layout.key_nodes)
    assert num_gathered > 2 * trie.num_nodes
    assert num_gathered not in kept
    assert max(kept) == trie.num_nodes


def test_many_copies_of_a_key_are_summed_in_fp32() -> None:
    """Added up one by one in bf16, the thousand equal gradients of a shared key would stop growing at 256 of them."""
    prefix = [3, 4]
    tokens = [[*prefix, 10 + i, 1] for i in range(1000)]
    labels = [[IGNORED, IGNORED, IGNORED, 1]] * 1000
    trie = trie_of(flat(tokens, labels))
    layout = build_varlen_layout(trie, window=None)
    query = torch.zeros(trie.num_nodes, 1, 8, dtype=torch.bfloat16)
    key = torch.zeros_like(query)
    value = torch.zeros_like(query).requires_grad_()
    with flash_on_cpu():
        out = VarlenAttention.apply(query, key, value, layout, 0.3)
        [grad] = torch.autograd.grad(out, value, torch.ones_like(out))
    expected = 1 + 1 / 2 + 1000 / 3
    assert abs(float(grad[0, 0, 0]) - expected) / expected < 0.01


def test_soft_capping_is_refused() -> None:
    trie = two_sequences()
    inputs = random_nodes(4, 4, heads=(2, 2), head_size=8, dtype=torch.float64)
    layout = TrieLayout(trie, kind="varlen", num_heads=2, num_key_heads=2, device=CPU)
    with pytest.raises(ValueError, match="not support soft-capping"):
        attend(*inputs, layout, window=None, scale=0.3, softcap=30.0)
