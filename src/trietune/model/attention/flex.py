"""Attention of a trie by FlexAttention: one kernel under a mask of blocks that is made on the host.

Whether a block of 128 queries and 128 keys is empty, full or mixed follows from the least and the greatest
`subtree_end` of its keys and from which nodes its queries are, so the table costs (T / 128)^2 comparisons and no
`T x T` mask exists. Only in mixed blocks does the kernel ask for each pair:

                 keys 0..127    128..255    256..383
    queries 0..127    mixed
          128..255    full        mixed                    all of 128..255 lie below all of 0..127
          256..383    full        empty       mixed        the subtrees of 128..255 have ended

Lengths are padded to multiples of 128; a padding node sees only itself, for a query that sees nothing has no softmax.

Letters: T nodes, N nodes that query, H query heads, G key and value heads, d head size; Q and K blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from trietune.trie import Trie

BLOCK = 128
BACKEND = "inductor"

# Programs that PyTorch may keep of one function: two numbers of dimensions that change, times windows, times forward
# alone or with backward, times all nodes or some. At its own limit of 8 it would continue without a compiled kernel.
MAX_PROGRAMS = 64


@dataclass(frozen=True, slots=True)
class BlockTable:
    """What a block of queries (first axis) sees of a block of keys (second): nothing where both are False.

    Attributes:
        is_mixed: some query sees some key, or may: each pair is to be asked for.
        is_full: every query sees every key.
    """

    is_mixed: Bool[np.ndarray, "QB KB"]
    is_full: Bool[np.ndarray, "QB KB"]


@dataclass(frozen=True, slots=True)
class FlexLayout:
    """A trie for one attention window.

    Attributes:
        num_queries: N, without padding.
        num_nodes: T, without padding.
        block_mask: which padded queries see which padded nodes.
    """

    num_queries: int
    num_nodes: int
    block_mask: BlockMask


def build_flex_layout(
    trie: Trie,
    query_nodes: Int64[np.ndarray, " Q"] | None = None,
    *,
    window: int | None,
    to_device: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> FlexLayout:
    """The block mask of a trie.

    Args:
        query_nodes: nodes that query, ascending; None: all. Queries are then numbered by their place here.
        window: number of positions that a query sees, itself included.
        to_device: takes what was built on the host to the device.
    """
    num_nodes = trie.num_nodes
    num_queries = num_nodes if query_nodes is None else len(query_nodes)
    padded = round_up(num_nodes)
    subtree_end, depth = np.arange(1, padded + 1), np.zeros(padded, np.int64)
    subtree_end[:num_nodes], depth[:num_nodes] = trie.subtree_end, trie.position_ids
    query_node = np.arange(padded)
    if query_nodes is not None:  # padding repeats the last query
        query_node = np.pad(query_nodes, (0, round_up(num_queries) - num_queries), mode="edge")
    table = tabulate_blocks(query_node, subtree_end, depth, window)

    def on_device(array: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(np.ascontiguousarray(array, np.int32)))

    def ordered(dense: np.ndarray) -> tuple[Tensor, Tensor]:
        """How many blocks of each line are set, and which, those first: [1, 1, lines] and [1, 1, lines, blocks]."""
        order = np.argsort(~dense, axis=1, kind="stable")
        return on_device(dense.sum(1)[None, None]), on_device(order[None, None])

    kv_num_blocks, kv_indices = ordered(table.is_mixed)
    full_kv_num_blocks, full_kv_indices = ordered(table.is_full)
    q_num_blocks, q_indices = ordered(table.is_mixed.T)
    full_q_num_blocks, full_q_indices = ordered(table.is_full.T)
    block_mask = BlockMask(
        seq_lengths=(len(query_node), padded),
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num_blocks,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num_blocks,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num_blocks,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_pairs(
            on_device(query_node),
            on_device(subtree_end),
            *(() if window is None else (on_device(depth[query_node]), on_device(depth + window))),
        ),
    )
    return FlexLayout(num_queries, num_nodes, block_mask)


def tabulate_blocks(
    query_node: Int64[np.ndarray, " Q"],
    subtree_end: Int64[np.ndarray, " T"],
    depth: Int64[np.ndarray, " T"],
    window: int | None,
) -> BlockTable:
    """Sort the blocks of ascending queries and of all nodes, both of padded length, into empty, mixed and full.

    Full blocks are found exactly. Without a window and with all nodes querying, so are empty ones; otherwise a mixed
    block may turn out to hold no pair.
    """
    query, end = query_node.reshape(-1, 1, BLOCK), subtree_end.reshape(1, -1, BLOCK)
    first_query, last_query = query.min(2), query.max(2)
    first_key = np.arange(0, len(subtree_end), BLOCK)[None]
    last_key = first_key + BLOCK - 1
    sees_all = (last_key <= first_query) & (last_query < end.min(2))
    sees_some = (first_key <= last_query) & (first_query < end.max(2))
    if window is not None:
        query_depth, key_depth = depth[query_node].reshape(-1, 1, BLOCK), depth.reshape(1, -1, BLOCK)
        sees_all &= query_depth.max(2) - key_depth.min(2) < window
        sees_some &= query_depth.min(2) - key_depth.max(2) < window
    return BlockTable(is_mixed=sees_some & ~sees_all, is_full=sees_all)


def flex_attend(
    query: Float[Tensor, "Q H d"],
    key: Float[Tensor, "T G d"],
    value: Float[Tensor, "T G d"],
    layout: FlexLayout,
    *,
    scale: float,
    softcap: float | None,
) -> Float[Tensor, "Q H d"]:
    """Softmax attention of `query` under the layout's mask, in the inputs' dtype."""
    out: Tensor = compiled()(
        _padded(query),
        _padded(key),
        _padded(value),
        score_mod=None if softcap is None else _soft_cap(softcap),
        block_mask=layout.block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)[: layout.num_queries]


def round_up(length: int) -> int:
    """The next multiple of the block size: other lengths fail in the kernel's backward."""
    return -(-length // BLOCK) * BLOCK


def _padded(x: Float[Tensor, "T H d"]) -> Float[Tensor, "1 H L d"]:
    padding = round_up(len(x)) - len(x)
    return torch.nn.functional.pad(x.transpose(0, 1), (0, 0, 0, padding))[None]


def _pairs(
    query_node: Tensor, subtree_end: Tensor, query_depth: Tensor | None = None, unseen_from: Tensor | None = None
) -> Callable[..., Tensor]:
    """Whether one query sees one key; with a window, only from depths before the key's `unseen_from`.

    Captures only tensors: a number that changes would be another program, or a symbol in the kernel.
    """

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        node = query_node[query]
        is_ancestor = (key <= node) & (node < subtree_end[key])
        if query_depth is None or unseen_from is None:
            return is_ancestor
        return is_ancestor & (query_depth[query] < unseen_from[key])

    return sees


@cache
def _soft_cap(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@cache
def compiled() -> Callable[..., Any]:
    """FlexAttention as one compiled function for all lengths: two compilations, then a new length runs at once."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_PROGRAMS)
    torch._dynamo.config.specialize_float = True  # scale and soft cap are constants of a model, not inputs
    return torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=BACKEND)
