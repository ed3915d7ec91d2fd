"""How the nodes of a trie attend: rows against their paths, or all nodes under a mask.

In sorted order the nodes that a sequence adds are one contiguous row, and everything they see lies on that sequence's
path, so attention is a set of small causal problems aligned at their ends:

    row 0   queries 0 1 2   keys 0 1 2          row 1   queries 3   keys 0 1 3

Rows of similar length are padded into one bucket and computed by batched matrix products. Heads that share a key and
value head are stacked under each other, so keys and values are gathered once for all of them. Keys, values and queries
are gathered again in the backward instead of kept; what is kept is the probabilities of small buckets. A bucket whose
probabilities would be large runs through PyTorch's flash kernel and keeps none.

Letters: T nodes, H query heads, G key and value heads, d head size; in a bucket R rows, Q queries and K keys a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from trietune.trie import Trie

AttentionKind = Literal["rows", "mask"]

# Rows and paths are rounded up to the next of these lengths, so that few buckets hold all rows of a trie.
BUCKET_GROWTH = 1.35

# Elements of one bucket's probabilities above which they are recomputed (flash kernel) rather than kept.
MAX_KEPT_PROBABILITIES = 16_000_000


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


class TrieLayout:
    """What attention needs to know of one trie; built once a micro-batch and shared by all layers.

    Layers with a sliding window get a layout of their own, made when the first of them asks.

    Args:
        kind: `rows`, or `mask`: all nodes at once under a [T, T] mask, the reference.
        needed: nodes, ascending, whose hidden states are wanted of the last layer; None wants all.
    """

    def __init__(
        self,
        trie: Trie,
        *,
        kind: AttentionKind,
        num_heads: int,
        num_key_heads: int,
        device: torch.device,
        needed: Int64[np.ndarray, " N"] | None = None,
    ) -> None:
        self.kind = kind
        self.needed = None if needed is None else torch.from_numpy(needed).to(device)
        self._needed = needed
        self._trie = trie
        self._num_heads = num_heads
        self._num_key_heads = num_key_heads
        self._device = device
        self._rows: dict[tuple[int | None, torch.dtype, bool], RowLayout] = {}
        self._masks: dict[int | None, Bool[Tensor, "1 1 T T"]] = {}
        self._deepest = int(trie.position_ids.max(initial=0))

    def rows(self, window: int | None, dtype: torch.dtype, *, of_needed: bool = False) -> RowLayout:
        """The buckets for a layer.

        Args:
            window: number of positions that a query sees, itself included.
            of_needed: only the needed nodes query.
        """
        key = (self._effective(window), dtype, of_needed)
        if key not in self._rows:
            self._rows[key] = build_row_layout(
                self._trie,
                self._needed if of_needed else None,
                window=key[0],
                num_heads=self._num_heads,
                num_key_heads=self._num_key_heads,
                dtype=dtype,
                device=self._device,
            )
        return self._rows[key]

    def mask(self, window: int | None) -> Bool[Tensor, "1 1 T T"]:
        """True where a query (third axis) sees a key (fourth)."""
        window = self._effective(window)
        if window not in self._masks:
            self._masks[window] = torch.from_numpy(visibility(self._trie, window)).to(self._device)[None, None]
        return self._masks[window]

    def _effective(self, window: int | None) -> int | None:
        return None if window is None or window > self._deepest else window


def visibility(trie: Trie, window: int | None = None) -> Bool[np.ndarray, "T T"]:
    """`[i, j]` is True when node `i` sees node `j`: `j <= i < subtree_end[j]`, and within the window by depth."""
    node = np.arange(trie.num_nodes)
    sees: np.ndarray = (node[None] <= node[:, None]) & (node[:, None] < trie.subtree_end[None])
    if window is not None:
        sees &= trie.position_ids[:, None] - trie.position_ids[None] < window
    return sees


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


class RowAttention(torch.autograd.Function):
    """Softmax attention of every bucket, gathered, computed and laid back in node order.

    Inputs: query [T * H, d], key and value [T * G, d]; output [T * H, d] in the inputs' dtype. Scores are rounded to
    the inputs' dtype, as in the library's own `eager` attention; softmax and sums of gradients are taken in fp32
    (fp64 for fp64 inputs).
    """

    @staticmethod
    def forward(
        context: Any,
        query: Float[Tensor, "TH d"],
        key: Float[Tensor, "TG d"],
        value: Float[Tensor, "TG d"],
        layout: RowLayout,
        scale: float,
        softcap: float | None,
    ) -> Float[Tensor, "TH d"]:
        outputs: list[Tensor] = []
        kept: list[Tensor | None] = []
        for bucket in layout.buckets:
            q, k, v = _gather(bucket, query, key, value)
            if _keeps_probabilities(q, k, softcap):
                scores = torch.bmm(q.mul_(scale), k.transpose(1, 2))
                tanh = None
                if softcap is not None:
                    tanh = scores.div_(softcap).tanh_()
                    scores = tanh * softcap
                _grid(scores, bucket).add_(bucket.bias)
                probabilities = torch.softmax(scores, -1)
                outputs.append(torch.bmm(probabilities, v).view(-1, v.shape[-1]))
                kept.extend((probabilities, tanh))
            else:
                out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    *_four_axes(bucket, q, k, v), attn_mask=_tiled_bias(bucket, q), scale=scale
                )
                outputs.append(out.reshape(-1, v.shape[-1]))
                kept.extend((out, log_sum))
        context.save_for_backward(query, key, value, *kept)
        context.layout, context.scale, context.softcap = layout, scale, softcap
        return torch.cat(outputs).index_select(0, layout.output_rows)

    @staticmethod
    def backward(context: Any, grad_output: Float[Tensor, "TH d"]) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = context.saved_tensors
        layout, scale, softcap = context.layout, context.scale, context.softcap
        grads_q, grads_k, grads_v = [], [], []
        laid_out = _lay_out(grad_output, layout)
        first = 0
        for number, bucket in enumerate(layout.buckets):
            q, k, v = _gather(bucket, query, key, value)
            grad_out = laid_out[first : first + bucket.query_rows.numel()].view(q.shape)
            first += bucket.query_rows.numel()
            saved = kept[2 * number : 2 * number + 2]
            if _keeps_probabilities(q, k, softcap):
                probabilities, tanh = saved
                grad_v = torch.bmm(probabilities.transpose(1, 2), grad_out)
                grad_scores = torch._softmax_backward_data(
                    torch.bmm(grad_out, v.transpose(1, 2)), probabilities, -1, probabilities.dtype
                )
                if tanh is not None:
                    grad_scores.mul_(1 - tanh.square())
                grad_q = torch.bmm(grad_scores, k).mul_(scale)
                grad_k = torch.bmm(grad_scores.transpose(1, 2), q.mul_(scale))
            else:
                out, log_sum = saved
                four = _four_axes(bucket, q, k, v)
                grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad_out.view(four[0].shape),
                    *four,
                    out,
                    log_sum,
                    0.0,
                    False,
                    attn_mask=_tiled_bias(bucket, q),
                    scale=scale,
                )
            grads_q.append(grad_q.reshape(-1, q.shape[-1]))
            grads_k.append(grad_k.reshape(-1, k.shape[-1]))
            grads_v.append(grad_v.reshape(-1, v.shape[-1]))
        return (
            torch.cat(grads_q).index_select(0, layout.output_rows),
            _sum_copies(torch.cat(grads_k), layout),
            _sum_copies(torch.cat(grads_v), layout),
            None,
            None,
            None,
        )


def _gather(bucket: Bucket, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [R * G, H/G * Q, d], keys and values [R * G, K, d] of one bucket."""
    num_keys = bucket.shape[2]
    groups = bucket.key_rows.numel() // num_keys  # R * G
    return (
        query.index_select(0, bucket.query_rows).view(groups, -1, query.shape[-1]),
        key.index_select(0, bucket.key_rows).view(groups, num_keys, key.shape[-1]),
        value.index_select(0, bucket.key_rows).view(groups, num_keys, value.shape[-1]),
    )


def _keeps_probabilities(q: Tensor, k: Tensor, softcap: float | None) -> bool:
    return (
        softcap is not None or q.device.type != "cpu" or q.shape[0] * q.shape[1] * k.shape[1] <= MAX_KEPT_PROBABILITIES
    )


def _grid(scores: Tensor, bucket: Bucket) -> Tensor:
    """Scores [R * G, H/G * Q, K] as [R, G, H/G, Q, K]."""
    num_rows, num_queries, num_keys = bucket.shape
    return scores.view(num_rows, scores.shape[0] // num_rows, -1, num_queries, num_keys)


def _four_axes(bucket: Bucket, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.view(bucket.shape[0], -1, x.shape[1], x.shape[2]) for x in tensors)


def _tiled_bias(bucket: Bucket, q: Tensor) -> Tensor:
    """The bias [R, 1, H/G * Q, K]: one copy for each of the heads stacked under each other."""
    return bucket.bias[:, 0].repeat(1, 1, q.shape[1] // bucket.shape[1], 1)


def _lay_out(grad_output: Tensor, layout: RowLayout) -> Tensor:
    """The gradient of the buckets' outputs, end to end; zero at padding queries."""
    total = sum(bucket.query_rows.numel() for bucket in layout.buckets)
    return grad_output.new_zeros(total, grad_output.shape[-1]).index_copy_(0, layout.output_rows, grad_output)


def _sum_copies(grads: Float[Tensor, "P d"], layout: RowLayout) -> Float[Tensor, "TG d"]:
    """Add the gradients of all copies of a key; `embedding_bag` sums segments in fp32 and in a fixed order."""
    return torch.nn.functional.embedding_bag(layout.key_order, grads, layout.key_start, mode="sum")


def trie_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 H T d"],
    key: Float[Tensor, "1 G T d"],
    value: Float[Tensor, "1 G T d"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    trie_layout: TrieLayout | None = None,
    **other: Any,
) -> tuple[Float[Tensor, "1 T H d"], Tensor | None]:
    """The library's attention interface. Without a layout (generation, padded rows) it is the library's own attention.

    Raises:
        ValueError: if `dropout` is set; attention dropout would need one draw for each pair that a branch sees.
    """
    if trie_layout is None:
        return _library_attention(softcap)(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            softcap=softcap,
            **other,
        )
    if dropout:
        raise ValueError("attention dropout is not defined on a trie")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if trie_layout.kind == "mask":
        return _masked(query, key, value, trie_layout.mask(sliding_window), scale, softcap), None
    num_heads, head_size = query.shape[1], query.shape[-1]
    layout = trie_layout.rows(sliding_window, query.dtype)
    flat = (x[0].transpose(0, 1).reshape(-1, head_size) for x in (query, key, value))
    out: Tensor = RowAttention.apply(*flat, layout, scale, softcap)  # type: ignore[no-untyped-call]
    return out.view(1, -1, num_heads, head_size), None


def _masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Float[Tensor, "1 T H d"]:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    else:
        scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
        scores = scores.masked_fill(~mask, -torch.inf)
        accumulate = torch.promote_types(scores.dtype, torch.float32)
        out = torch.softmax(scores, -1, dtype=accumulate).to(query.dtype) @ value
    return out.transpose(1, 2)


def _library_attention(softcap: float | None) -> Callable[..., tuple[Tensor, Tensor | None]]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    # The library's SDPA knows no soft-capping; its Gemma 2 form of plain attention does.
    attention: Callable[..., tuple[Tensor, Tensor | None]] = (
        sdpa_attention_forward if softcap is None else eager_attention_forward
    )
    return attention


def register() -> str:
    """Make the attention known to the library and return its name; may be called again."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    name = "trietune"
    AttentionInterface.register(name, trie_attention)
    # Only used without a layout: additive masks suit both of the library's attentions behind `trie_attention`.
    AttentionMaskInterface.register(name, eager_mask)
    return name
