"""The rows of a trie gathered into blocks, and blocks into buckets: where each query, key and output lies.

In sorted order the nodes that a sequence adds are one contiguous row, and everything they see lies on that sequence's
path, so attention is a set of small causal problems aligned at their ends:

    row 0   queries 0 1 2   keys 0 1 2          row 1   queries 3   keys 0 1 3

Neighboring rows may be computed as one *block*: their nodes attend what all of them share and each other, under a
mask. That wastes scores and saves gathers, copies and operations; one block of everything is the masked trie, a block
a row wastes nothing. The cut is the one with the least estimated time. Blocks of similar size are padded into one
bucket. Heads that share a key and value head are stacked under each other, so keys and values are gathered once for all
of them.

Letters: T nodes, H query heads, G key and value heads; in a bucket R blocks, Q queries and K keys per block.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from trietune.trie import Trie

# Blocks of more rows than this are not considered, unless the whole trie is one: it bounds the search.
MOST_ROWS_OF_A_BLOCK = 64


# One block, or an array of them.
Count = np.ndarray | np.integer | np.floating


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """Microseconds that attention takes, forward and backward, in a layer; `benchmarks/attention.py` fits them.

    Attributes:
        bucket: the operations of one bucket, however small.
        whole: the operations of a bucket that is the whole trie as one block, from which nothing is gathered.
        gathered: one query or key of one block, copied there and back.
        score: one query with one key, all heads.
    """

    bucket: float
    gathered: float
    score: float
    whole: float = math.inf

    def of(self, num_blocks: Count, queries: Count, keys: Count) -> Any:
        """One number per bucket."""
        cost: object = self.bucket + num_blocks * self.of_block(queries, keys)
        return cost

    def of_whole(self, queries: Count, keys: Count) -> Count:
        """Of one block that is the whole trie, with its bucket."""
        cost: Count = self.whole + self.of_block(queries, keys)
        return cost

    def of_block(self, queries: Count, keys: Count) -> Count:
        """One number per block, without the bucket that it shares."""
        cost: Count = self.gathered * (queries + keys) + self.score * queries * keys
        return cost


def attention_cost(*, num_heads: int, head_size: int, dtype: torch.dtype) -> AttentionCost:
    """Measured on two cores with AVX-512; only the ratios matter, and they matter little.

    `whole` is from steps of a run, where operations cost more, next to arithmetic, than by themselves.
    """
    product = 0.0155e-3 if dtype == torch.bfloat16 else 0.06e-3
    score = num_heads * (0.6e-3 + product * head_size)
    return AttentionCost(bucket=220.0, gathered=0.15, score=score, whole=120.0)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Blocks padded to one shape.

    Attributes:
        shape: (R, Q, K).
        query_rows: where each query lies in the flattened [T * H] rows of d numbers (of the queries only, where only
            some nodes query); [R, G, H/G, q] flat.
        key_rows: where each key lies in the flattened [T * G] rows; [R, G, k] flat.
        bias: 0 where a query sees a key, -inf elsewhere, in fp32 or fp64; [R, 1, 1, q, k].
        is_whole: one block of all that query and of all keys, in their order.
    """

    shape: tuple[int, int, int]
    query_rows: Int64[Tensor, " RHq"]
    key_rows: Int64[Tensor, " RGk"]
    bias: Float[Tensor, "R 1 1 q k"]
    is_whole: bool


@dataclass(frozen=True, slots=True)
class RowLayout:
    """All buckets of a trie for one attention window.

    Attributes:
        buckets: together they hold every node that queries once.
        output_rows: for each of the [T * H] output rows, where it lies among the buckets' outputs, laid end to end.
        key_order: the rows of all buckets' keys, laid end to end, sorted by the [T * G] row they were gathered from;
            padding left out.
        key_start: where the copies of each of the T * G rows begin in `key_order`.
        keeps_none: no bucket keeps its probabilities, however small; for proofs of what large ones run through.
    """

    buckets: tuple[Bucket, ...]
    output_rows: Int64[Tensor, " TH"]
    key_order: Int64[Tensor, " P"]
    key_start: Int64[Tensor, " TG"]
    keeps_none: bool = False


@dataclass(frozen=True, slots=True)
class Blocks:
    """What each block computes: its queries, and as keys some ancestors and then its own nodes.

    Attributes:
        first_query, num_queries: each block's queries, as places in the array of querying nodes.
        keys: nodes, block after block.
        key_start: where each block's keys begin in `keys`, and their number at the end.
    """

    first_query: Int64[np.ndarray, " R"]
    num_queries: Int64[np.ndarray, " R"]
    keys: Int64[np.ndarray, " A"]
    key_start: Int64[np.ndarray, " R+1"]

    @property
    def num_keys(self) -> Int64[np.ndarray, " R"]:
        return np.diff(self.key_start)


def build_row_layout(
    trie: Trie,
    query_nodes: Int64[np.ndarray, " Q"] | None = None,
    *,
    window: int | None,
    num_heads: int,
    num_key_heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    cost: AttentionCost | None = None,
    keeps_none: bool = False,
) -> RowLayout:
    """Cut `trie` into blocks, sort them into buckets, and index their queries, keys and outputs.

    Args:
        query_nodes: nodes that query, ascending; None: all. Queries and outputs are then numbered by their place here.
        window: number of positions that a query sees, itself included.
        cost: by which the cut is chosen; None takes what was measured for such heads.
        keeps_none: see `RowLayout`.
    """
    if query_nodes is None:
        query_nodes = np.arange(trie.num_nodes)
    cost = cost or attention_cost(num_heads=num_heads, head_size=head_size, dtype=dtype)
    blocks, groups = cut_into_blocks(trie, query_nodes, window, cost)
    buckets, output_node, output_at, key_node, key_at = [], [], [], [], []
    queries_before = keys_before = 0
    for group in groups:
        queries, keys, sees, is_query, is_key = _bucket_nodes(trie, query_nodes, blocks, group, window)
        query_rows = _head_rows(queries, num_heads)  # [R, H, q]: heads of one key head are neighbors
        key_rows = _head_rows(keys, num_key_heads)
        bias = np.where(sees, np.float32(0), -np.inf)[:, None, None]
        buckets.append(
            Bucket(
                shape=sees.shape,
                query_rows=torch.from_numpy(query_rows.reshape(-1)).to(device),
                key_rows=torch.from_numpy(key_rows.reshape(-1)).to(device),
                bias=torch.from_numpy(bias).to(device, torch.promote_types(dtype, torch.float32)),
                is_whole=sees.shape == (1, len(query_nodes), trie.num_nodes),
            )
        )
        real = np.broadcast_to(is_query[:, None], query_rows.shape)
        output_node.append(query_rows[real])
        output_at.append(np.flatnonzero(real) + queries_before)
        real = np.broadcast_to(is_key[:, None], key_rows.shape)
        key_node.append(key_rows[real])
        key_at.append(np.flatnonzero(real) + keys_before)
        queries_before += query_rows.size
        keys_before += key_rows.size
    output_rows = np.empty(len(query_nodes) * num_heads, np.int64)
    output_rows[np.concatenate(output_node)] = np.concatenate(output_at)
    key_of_copy = np.concatenate(key_node)
    by_key = np.argsort(key_of_copy, kind="stable")
    key_start = np.searchsorted(key_of_copy[by_key], np.arange(trie.num_nodes * num_key_heads))
    return RowLayout(
        buckets=tuple(buckets),
        output_rows=torch.from_numpy(output_rows).to(device),
        key_order=torch.from_numpy(np.concatenate(key_at)[by_key]).to(device),
        key_start=torch.from_numpy(key_start).to(device),
        keeps_none=keeps_none,
    )


def cut_into_blocks(
    trie: Trie, query_nodes: Int64[np.ndarray, " Q"], window: int | None, cost: AttentionCost
) -> tuple[Blocks, list[np.ndarray]]:
    """The blocks, and for each bucket which blocks it holds, that take the least time of those that are tried."""
    rows = _QueryRows.of(trie, query_nodes)
    cuts = [np.array([0, rows.num_rows])]  # one block: the masked trie
    # What a block must save to be worth its own: nothing, if many share a bucket; a whole bucket, if it has its own.
    cuts += [_cut(rows, cost, worth_a_block) for worth_a_block in (0.0, 0.15 * cost.bucket, cost.bucket)]
    best: tuple[float, Blocks, list[np.ndarray]] | None = None
    for cut in cuts:
        blocks = _make_blocks(trie, query_nodes, rows, cut, window)
        groups, microseconds = _fill_buckets(blocks.num_queries, blocks.num_keys, cost)
        if len(cut) == 2 and blocks.num_keys[0] == trie.num_nodes:
            microseconds = min(microseconds, float(cost.of_whole(blocks.num_queries[0], blocks.num_keys[0])))
        if best is None or microseconds < best[0]:
            best = microseconds, blocks, groups
    assert best is not None
    return best[1], best[2]


@dataclass(frozen=True, slots=True)
class _QueryRows:
    """Rows that have a query.

    Attributes:
        first_query, num_queries: as places in the array of querying nodes.
        first_node, end_node: the row up to its last query.
        num_ancestors: nodes of its path before its first node.
        path_start: where its path begins in `row_path`.
    """

    first_query: Int64[np.ndarray, " R"]
    num_queries: Int64[np.ndarray, " R"]
    first_node: Int64[np.ndarray, " R"]
    end_node: Int64[np.ndarray, " R"]
    num_ancestors: Int64[np.ndarray, " R"]
    path_start: Int64[np.ndarray, " R"]

    @classmethod
    def of(cls, trie: Trie, query_nodes: Int64[np.ndarray, " Q"]) -> "_QueryRows":
        row_of_query = np.searchsorted(trie.row_start, query_nodes, side="right") - 1
        row, first, num_queries = np.unique(row_of_query, return_index=True, return_counts=True)
        first_node, path_start, path_end, end_of_row = (
            x.astype(np.int64)
            for x in (
                trie.row_start[row],
                trie.row_path_start[row],
                trie.row_path_start[row + 1],
                trie.row_start[row + 1],
            )
        )
        return cls(
            first_query=first,
            num_queries=num_queries,
            first_node=first_node,
            end_node=query_nodes[first + num_queries - 1].astype(np.int64) + 1,
            num_ancestors=path_end - path_start - (end_of_row - first_node),
            path_start=path_start,
        )

    @property
    def num_rows(self) -> int:
        return len(self.first_query)


def _cut(rows: _QueryRows, cost: AttentionCost, worth_a_block: float) -> Int64[np.ndarray, " C1"]:
    """Where blocks begin, and the number of rows at the end; dynamic programming over the last block."""
    num = rows.num_rows
    queries = np.concatenate(([0], np.cumsum(rows.num_queries)))
    least = np.zeros(num + 1)
    best_first = np.zeros(num + 1, np.int64)
    for end in range(1, num + 1):
        first = np.arange(max(0, end - MOST_ROWS_OF_A_BLOCK), end)
        num_queries = queries[end] - queries[first]
        num_keys = rows.num_ancestors[first] + rows.end_node[end - 1] - rows.first_node[first]
        total = least[first] + worth_a_block + cost.of_block(num_queries, num_keys)
        at = int(total.argmin())
        least[end], best_first[end] = total[at], first[at]
    starts = [num]
    while starts[-1] > 0:
        starts.append(int(best_first[starts[-1]]))
    return np.array(starts[::-1])


def _make_blocks(
    trie: Trie,
    query_nodes: Int64[np.ndarray, " Q"],
    rows: _QueryRows,
    cut: Int64[np.ndarray, " C1"],
    window: int | None,
) -> Blocks:
    first, last = cut[:-1], cut[1:] - 1
    first_query = rows.first_query[first]
    num_queries = np.add.reduceat(rows.num_queries, first)
    ancestors, own = rows.num_ancestors[first], rows.end_node[last] - rows.first_node[first]
    num_keys = ancestors + own
    key_start = np.concatenate(([0], np.cumsum(num_keys)))
    at = np.arange(key_start[-1]) - np.repeat(key_start[:-1], num_keys)
    is_ancestor = at < np.repeat(ancestors, num_keys)
    keys = np.where(
        is_ancestor,
        trie.row_path[np.minimum(np.repeat(rows.path_start[first], num_keys) + at, len(trie.row_path) - 1)],
        np.repeat(rows.first_node[first] - ancestors, num_keys) + at,
    ).astype(np.int64)
    if window is not None:  # keys further back than the block's shallowest query can see are not gathered
        shallowest = np.minimum.reduceat(trie.position_ids[query_nodes].astype(np.int64), first_query)
        is_seen = trie.position_ids[keys] > np.repeat(shallowest - window, num_keys)
        block = np.repeat(np.arange(len(first)), num_keys)[is_seen]
        keys = keys[is_seen]
        key_start = np.concatenate(([0], np.cumsum(np.bincount(block, minlength=len(first)))))
    return Blocks(first_query, num_queries, keys, key_start)


def _fill_buckets(
    num_queries: Int64[np.ndarray, " R"], num_keys: Int64[np.ndarray, " R"], cost: AttentionCost
) -> tuple[list[np.ndarray], float]:
    """Which blocks share a bucket, and the estimated time of all buckets.

    Blocks of similar sizes begin together; then two buckets become one as long as that takes less time.
    """
    size = np.stack((_size_class(num_keys), _size_class(num_queries)))
    _, group = np.unique(size, axis=1, return_inverse=True)
    order = np.argsort(-group.ravel(), kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(group.ravel()[order])) + 1)
    count = np.array([len(g) for g in groups])
    queries = np.array([num_queries[g].max() for g in groups])
    keys = np.array([num_keys[g].max() for g in groups])
    while len(groups) > 1:
        together = cost.of(
            count[:, None] + count[None], np.maximum.outer(queries, queries), np.maximum.outer(keys, keys)
        )
        apart = cost.of(count, queries, keys)
        saved = apart[:, None] + apart[None] - together
        np.fill_diagonal(saved, -np.inf)
        a, b = sorted(divmod(int(saved.argmax()), len(groups)))
        if saved[a, b] <= 0:
            break
        groups[a] = np.concatenate((groups[a], groups.pop(b)))
        count[a] += count[b]
        queries[a], keys[a] = max(queries[a], queries[b]), max(keys[a], keys[b])
        count, queries, keys = (np.delete(x, b) for x in (count, queries, keys))
    return groups, float(cost.of(count, queries, keys).sum())


def _size_class(length: Int64[np.ndarray, " R"]) -> Int64[np.ndarray, " R"]:
    """Lengths within a fifth of each other; the shortest all together."""
    size: np.ndarray = np.ceil(np.log(np.maximum(length, 8) / 8) / np.log(1.2))
    return size.astype(np.int64)


def _bucket_nodes(
    trie: Trie,
    query_nodes: Int64[np.ndarray, " Q"],
    blocks: Blocks,
    group: Int64[np.ndarray, " r"],
    window: int | None,
) -> tuple[
    Int64[np.ndarray, "r q"],
    Int64[np.ndarray, "r k"],
    Bool[np.ndarray, "r q k"],
    Bool[np.ndarray, "r q"],
    Bool[np.ndarray, "r k"],
]:
    """Queries by their place in `query_nodes`, keys by node, who sees whom, and which of them are real.

    Padding repeats the last query or key, and no query sees a padding key.
    """
    num_queries, num_keys = blocks.num_queries[group], blocks.num_keys[group]
    query_at, key_at = np.arange(num_queries.max()), np.arange(num_keys.max())
    is_query, is_key = query_at < num_queries[:, None], key_at < num_keys[:, None]
    queries = blocks.first_query[group, None] + np.minimum(query_at, num_queries[:, None] - 1)
    keys = blocks.keys[blocks.key_start[group, None] + np.minimum(key_at, num_keys[:, None] - 1)]
    query_node, key_node = query_nodes[queries][:, :, None], keys[:, None, :]
    sees = trie.sees(query_node, key_node, window) & is_key[:, None, :]
    return queries.astype(np.int64), keys, sees, is_query, is_key


def _head_rows(nodes: Int64[np.ndarray, "R L"], num_heads: int) -> Int64[np.ndarray, "R H L"]:
    return nodes[:, None, :] * num_heads + np.arange(num_heads)[None, :, None]
