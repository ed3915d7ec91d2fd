"""The rows of a trie sorted into buckets: where each query, key and output lies.

In sorted order the nodes that a sequence adds are one contiguous row, and everything they see lies on that sequence's
path, so attention is a set of small causal problems aligned at their ends:

    row 0   queries 0 1 2   keys 0 1 2          row 1   queries 3   keys 0 1 3

Rows of similar length are padded into one bucket. Heads that share a key and value head are stacked under each other,
so keys and values are gathered once for all of them.

Letters: T nodes, H query heads, G key and value heads; in a bucket R rows, Q queries and K keys a row.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trietune.trie import Trie

# Rows and paths are rounded up to the next of these lengths, so that few buckets hold all rows of a trie.
BUCKET_GROWTH = 1.35


@dataclass(frozen=True, slots=True)
class Bucket:
    """Rows padded to one shape.

    Attributes:
        shape: (R, Q, K).
        query_rows: where each query lies in the flattened [T * H] rows of d numbers (of the queries alone, where only
            some nodes query); [R, G, H/G, Q] flat.
        key_rows: where each key lies in the flattened [T * G] rows; [R, G, K] flat.
        bias: 0 where a query sees a key, -inf elsewhere; [R, 1, 1, Q, K].
    """

    shape: tuple[int, int, int]
    query_rows: Int64[Tensor, " RHQ"]
    key_rows: Int64[Tensor, " RGK"]
    bias: Float[Tensor, "R 1 1 Q K"]


@dataclass(frozen=True, slots=True)
class RowLayout:
    """All buckets of a trie for one attention window.

    Attributes:
        buckets: together they hold every node that queries once.
        output_rows: for each of the [T * H] output rows, where it lies among the buckets' outputs, laid end to end.
        key_order: the rows of all buckets' keys, laid end to end, sorted by the [T * G] row they were gathered from;
            padding left out.
        key_start: where the copies of each of the T * G rows begin in `key_order`.
    """

    buckets: tuple[Bucket, ...]
    output_rows: Int64[Tensor, " TH"]
    key_order: Int64[Tensor, " P"]
    key_start: Int64[Tensor, " TG"]


def build_row_layout(
    trie: Trie,
    querying: Int64[np.ndarray, " N"] | None = None,
    *,
    window: int | None,
    num_heads: int,
    num_key_heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> RowLayout:
    """Sort the rows of `trie` into buckets and index their queries, keys and outputs.

    Args:
        querying: nodes that query, ascending; None: all. Queries and outputs are then numbered by their place here.
    """
    if querying is None:
        querying = np.arange(trie.num_nodes)
    row_of_query = np.searchsorted(trie.row_start, querying, side="right") - 1
    row, first, num_queries = np.unique(row_of_query, return_index=True, return_counts=True)
    path_start, path_end = (trie.row_path_start[row + at].astype(np.int64) for at in (0, 1))
    num_keys = path_end - path_start
    if window is not None:  # keys further back than the row's first query can see are not gathered
        last_depth = trie.position_ids[trie.row_path[path_end - 1]]
        num_keys = np.minimum(num_keys, last_depth - trie.position_ids[querying[first]] + window)
    buckets, output_node, output_at, key_node, key_at = [], [], [], [], []
    queries_before = keys_before = 0
    for group in group_rows(num_queries, num_keys):
        queries, keys, bias, is_query, is_key = _bucket_nodes(
            trie, querying, first[group], num_queries[group], path_end[group], num_keys[group], window
        )
        query_rows = _head_rows(queries, num_heads)  # [R, H, Q]: heads of one key head are neighbours
        key_rows = _head_rows(keys, num_key_heads)
        buckets.append(
            Bucket(
                shape=bias.shape,
                query_rows=torch.from_numpy(query_rows.reshape(-1)).to(device),
                key_rows=torch.from_numpy(key_rows.reshape(-1)).to(device),
                bias=torch.from_numpy(bias[:, None, None]).to(device, dtype),
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
    output_rows = np.empty(len(querying) * num_heads, np.int64)
    output_rows[np.concatenate(output_node)] = np.concatenate(output_at)
    key_of_copy = np.concatenate(key_node)
    by_key = np.argsort(key_of_copy, kind="stable")
    key_start = np.searchsorted(key_of_copy[by_key], np.arange(trie.num_nodes * num_key_heads))
    return RowLayout(
        buckets=tuple(buckets),
        output_rows=torch.from_numpy(output_rows).to(device),
        key_order=torch.from_numpy(np.concatenate(key_at)[by_key]).to(device),
        key_start=torch.from_numpy(key_start).to(device),
    )


def group_rows(num_queries: Int64[np.ndarray, " R"], num_keys: Int64[np.ndarray, " R"]) -> list[np.ndarray]:
    """Rows whose query and key counts round up to the same two lengths, largest first."""
    size = np.stack((_rounded(num_queries), _rounded(num_keys)))
    _, group = np.unique(size, axis=1, return_inverse=True)
    order = np.argsort(-group.ravel(), kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group.ravel()[order])) + 1)


def _rounded(length: Int64[np.ndarray, " R"]) -> Int64[np.ndarray, " R"]:
    exponent: np.ndarray = np.ceil(np.log(np.maximum(length, 8) / 8) / np.log(BUCKET_GROWTH))
    return exponent.astype(np.int64)


def _bucket_nodes(
    trie: Trie,
    querying: Int64[np.ndarray, " N"],
    first: Int64[np.ndarray, " R"],
    num_queries: Int64[np.ndarray, " R"],
    path_end: Int64[np.ndarray, " R"],
    num_keys: Int64[np.ndarray, " R"],
    window: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Queries [R, Q] by their place in `querying`, keys [R, K] by node, their bias, and which of them are real.

    Rows and paths begin at the left; padding repeats the last node, and no real query sees a padding key.
    """
    query_at, key_at = np.arange(num_queries.max()), np.arange(num_keys.max())
    is_query, is_key = query_at < num_queries[:, None], key_at < num_keys[:, None]
    queries = first[:, None] + np.minimum(query_at, num_queries[:, None] - 1)
    keys = trie.row_path[(path_end - num_keys)[:, None] + np.minimum(key_at, num_keys[:, None] - 1)]
    distance = trie.position_ids[querying[queries]][:, :, None] - trie.position_ids[keys][:, None, :]
    sees = (distance >= 0) & is_key[:, None, :]
    if window is not None:
        sees &= distance < window
    return queries.astype(np.int64), keys.astype(np.int64), np.where(sees, np.float32(0), -np.inf), is_query, is_key


def _head_rows(nodes: Int64[np.ndarray, "R L"], num_heads: int) -> Int64[np.ndarray, "R H L"]:
    return nodes[:, None, :] * num_heads + np.arange(num_heads)[None, :, None]
