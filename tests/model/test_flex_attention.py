"""A mask of blocks made from the ends of subtrees is that of the library, and FlexAttention under it is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as library
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from model.flex_on_cpu import flex_on_cpu
from model.trie_examples import dense_attention, largest_difference, random_nodes, trie_of
from slow_cases import slow_but
from strategies import IGNORED, flat, question_batch
from trietune.model.attention import flex as flex_attention
from trietune.model.attention.attend import attend
from trietune.model.attention.flex import BLOCK, build_flex_layout
from trietune.model.attention.layout import TrieLayout, visibility
from trietune.trie import Trie

# The compiler looks at inputs that are results of others.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

CPU = torch.device("cpu")
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5}


@st.composite
def large_tries(draw: st.DrawFn) -> Trie:
    """Tries of some hundred nodes, so that there are several blocks, with branches at every depth."""
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    tokens: list[list[int]] = []
    for _ in range(draw(st.integers(1, 7))):
        stem = tokens[-1][: int(generator.integers(0, len(tokens[-1])))] if tokens else []
        tokens.append(stem + generator.integers(2, 40, int(generator.integers(2, 200))).tolist())
    return trie_of(flat(tokens, tokens))


WINDOWS = st.one_of(st.none(), st.sampled_from([1, 5, 127, 128, 129, 200]))


@settings(deadline=None, max_examples=30)
@given(large_tries(), WINDOWS)
def test_blocks_are_those_of_the_library(trie: Trie, window: int | None) -> None:
    ours = build_flex_layout(trie, window=window).block_mask
    length = ours.seq_lengths[0]
    theirs = create_block_mask(ours.mask_mod, None, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)
    np.testing.assert_array_equal(full_blocks(ours), full_blocks(theirs))
    if window is None:
        np.testing.assert_array_equal(blocks(ours), blocks(theirs))
    else:  # an empty block may be asked for, a needed one may not be left out
        assert not (blocks(theirs) & ~blocks(ours)).any()


@settings(deadline=None, max_examples=30)
@given(large_tries(), WINDOWS, st.booleans())
def test_the_mask_is_that_of_the_trie(trie: Trie, window: int | None, prunes: bool) -> None:
    query_nodes = np.unique(trie.label_index[::3]).astype(np.int64) if prunes else np.arange(trie.num_nodes)
    layout = build_flex_layout(trie, query_nodes if prunes else None, window=window)
    mask = layout.block_mask
    num_queries, num_keys = mask.seq_lengths
    assert num_queries % BLOCK == num_keys % BLOCK == 0
    asked = create_mask(mask.mask_mod, None, None, num_queries, num_keys, device="cpu")[0, 0].numpy()
    sees = visibility(trie, window)[query_nodes]
    np.testing.assert_array_equal(asked[: len(query_nodes), : trie.num_nodes], sees)
    assert not asked[: len(query_nodes), trie.num_nodes :].any(), "padding is seen"
    assert asked.any(1).all(), "a padding query sees nothing"
    # What the tables say of the blocks agrees with what each pair would answer.
    each = asked.reshape(num_queries // BLOCK, BLOCK, num_keys // BLOCK, BLOCK).swapaxes(1, 2)
    np.testing.assert_array_equal(full_blocks(mask), each.all((2, 3)))
    assert not (each.any((2, 3)) & ~blocks(mask)).any()


@settings(deadline=None, max_examples=30)
@given(large_tries(), WINDOWS)
def test_both_directions_of_the_table_agree(trie: Trie, window: int | None) -> None:
    mask = build_flex_layout(trie, window=window).block_mask
    derived = BlockMask.from_kv_blocks(
        mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices, BLOCK_SIZE=BLOCK
    )
    for ours, theirs in (
        ((mask.q_num_blocks, mask.q_indices), (derived.q_num_blocks, derived.q_indices)),
        ((mask.full_q_num_blocks, mask.full_q_indices), (derived.full_q_num_blocks, derived.full_q_indices)),
    ):
        np.testing.assert_array_equal(dense(*ours), dense(*theirs))
        assert ours[0].dtype == ours[1].dtype == torch.int32


def blocks(mask: BlockMask) -> np.ndarray:
    return dense(mask.kv_num_blocks, mask.kv_indices) | full_blocks(mask)


def full_blocks(mask: BlockMask) -> np.ndarray:
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    return dense(mask.full_kv_num_blocks, mask.full_kv_indices)


def dense(counts: torch.Tensor, indices: torch.Tensor) -> np.ndarray:
    table = np.zeros(indices.shape[2:], bool)
    for line, (count, order) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
        table[line, order[:count]] = True
    return table


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 5, 150])
@pytest.mark.parametrize("heads", slow_but([(4, 4), (4, 2), (3, 1)], (4, 2)))
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_outputs_and_gradients_are_those_of_the_mask(
    softcap: float | None, window: int | None, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = np.random.default_rng(4)
    stem = generator.integers(2, 40, 150).tolist()
    tokens = [stem + generator.integers(2, 40, length).tolist() for length in (3, 90, 40)]
    trie = trie_of(flat(tokens, [[IGNORED] * 150 + row[150:] for row in tokens]))
    needed = np.unique(trie.label_index).astype(np.int64)
    layout = TrieLayout(trie, kind="flex", num_heads=heads[0], num_key_heads=heads[1], device=CPU, query_nodes=needed)
    for prunes in (False, True):
        num_queries = len(needed) if prunes else trie.num_nodes
        inputs = random_nodes(trie.num_nodes, num_queries, heads=heads, head_size=8, dtype=dtype)
        how = {"window": window, "scale": 0.3, "softcap": softcap}
        with flex_on_cpu():
            ours = attend(*inputs, layout, **how, is_pruned=prunes)
            expected = dense_attention(*inputs, trie, **how, query_nodes=needed if prunes else None)
            difference = largest_difference(ours, expected, inputs)
        assert difference < TOLERANCES[dtype], f"{difference:.1e}"


def attended(seed: int, *, window: int | None, softcap: float | None, prunes: bool, scale: int) -> float:
    """Attend on a random trie; the largest difference from the dense formula."""
    trie = trie_of(question_batch(np.random.default_rng(seed), vocabulary=50, scale=scale))
    needed = np.unique(trie.label_index).astype(np.int64)
    num_queries = len(needed) if prunes else trie.num_nodes
    inputs = random_nodes(trie.num_nodes, num_queries, heads=(4, 2), head_size=16, dtype=torch.float64)
    layout = TrieLayout(trie, kind="flex", num_heads=4, num_key_heads=2, device=CPU, query_nodes=needed)
    how: dict[str, Any] = {"window": window, "scale": 0.3, "softcap": softcap}
    ours = attend(*inputs, layout, **how, is_pruned=prunes)
    return largest_difference(
        ours, dense_attention(*inputs, trie, **how, query_nodes=needed if prunes else None), inputs
    )


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """FlexAttention goes through the compiler, whose programs then run without a kernel; counts the programs."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(library, "_validate_device", lambda query, key, value: None)
    monkeypatch.setattr(flex_attention, "BACKEND", "aot_eager")
    flex_attention.compiled.cache_clear()
    yield lambda: int(counters["stats"]["unique_graphs"])
    flex_attention.compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_new_length_compiles_nothing_after_the_second(traced: Callable[[], int]) -> None:
    how: dict[str, Any] = {"window": None, "softcap": None, "prunes": False}
    programs = []
    for seed, scale in enumerate((2, 4, 8, 3, 16, 9)):
        assert attended(seed, **how, scale=scale) < TOLERANCES[torch.float64]
        programs.append(traced())
    assert programs == [1, 2, 2, 2, 2, 2]


@pytest.mark.slow
def test_every_kind_of_layer_has_its_program(traced: Callable[[], int]) -> None:
    """What makes a program is whether there is a window, soft-capping, a part of the nodes; no number does."""
    kinds = [(None, None, False), (5, None, False), (5, 2.0, False), (5, 2.0, True)]
    for window, softcap, prunes in kinds:
        assert attended(1, window=window, softcap=softcap, prunes=prunes, scale=4) < TOLERANCES[torch.float64]
    before = traced()
    assert before == len(kinds)
    for window in (7, 150):
        assert attended(2, window=window, softcap=None, prunes=False, scale=8) < TOLERANCES[torch.float64]
    assert traced() <= before + 1  # a second number of blocks
    assert before < flex_attention.MAX_PROGRAMS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own code
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (9, 2.0)])
def test_a_compiled_kernel_reads_our_blocks(window: int | None, softcap: float | None) -> None:
    """The compiler's kernel for CPUs, which has no backward: it goes through the same tables and mask functions."""
    for scale in (4, 8, 16):
        trie = trie_of(question_batch(np.random.default_rng(scale), vocabulary=50, scale=scale))
        inputs = random_nodes(trie.num_nodes, trie.num_nodes, heads=(4, 2), head_size=16, dtype=torch.float32)
        layout = TrieLayout(trie, kind="flex", num_heads=4, num_key_heads=2, device=CPU)
        how: dict[str, Any] = {"window": window, "scale": 0.3, "softcap": softcap}
        with torch.no_grad():
            query, key, value = (x.detach() for x in inputs)
            ours = attend(query, key, value, layout, **how)
            expected = dense_attention(query, key, value, trie, **how)
        torch.testing.assert_close(ours, expected, rtol=0, atol=3e-6)
