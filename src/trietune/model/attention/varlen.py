"""Attention of a trie by variable-length flash attention: its runs are the sequences of one call, without a mask.

A run is what queries side by side: the nodes that a sequence adds, or those of them that are wanted of the last layer.
Its keys are the path to its last node, gathered in front of each other. The kernel aligns a run with the end of its
keys, so that plain causal attention is the trie's:

    run 0   queries 0 1 2   keys 0 1 2          query_start   0 3 4
    run 1   queries 3       keys 0 1 3          key_start     0 3 6          key_nodes   0 1 2 0 1 3

Keys and values are gathered again in the backward pass instead of kept. A key that several runs read gets the sum of
their gradients, taken in fp32 and in a fixed order.

Letters: T nodes, N nodes that query, H query heads, G key and value heads, d head size, S runs, P gathered keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from trietune.trie import Trie

# No window, as the kernel writes it.
UNBOUNDED = -1


@dataclass(frozen=True, slots=True)
class VarlenLayout:
    """The runs of a trie for one attention window.

    Attributes:
        query_start: first query of each run, and N at the end.
        key_start: first gathered key of each run, and P at the end.
        key_nodes: the node of each gathered key.
        copy_order: gathered keys sorted by their node.
        copy_start: where the copies of each node begin in `copy_order`.
        max_queries: an upper bound of a run's queries.
        max_keys: and of its keys.
        window: positions that a query sees before itself, or `UNBOUNDED`.
    """

    query_start: Int32[Tensor, " S1"]
    key_start: Int32[Tensor, " S1"]
    key_nodes: Int64[Tensor, " P"]
    copy_order: Int64[Tensor, " P"]
    copy_start: Int64[Tensor, " T"]
    max_queries: int
    max_keys: int
    window: int


def build_varlen_layout(
    trie: Trie,
    query_nodes: Int64[np.ndarray, " Q"] | None = None,
    *,
    window: int | None,
    to_device: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> VarlenLayout:
    """Cut what queries into runs and list the keys of each.

    Args:
        query_nodes: nodes that query, ascending; None: all. Queries are then numbered by their place here.
        window: number of positions that a query sees, itself included.
        to_device: takes what was built on the host to the device.
    """
    if query_nodes is None:
        query_nodes = np.arange(trie.num_nodes)
    row = np.searchsorted(trie.row_start, query_nodes, side="right") - 1
    # Alignment at the end asks for queries without a gap, so a run also ends where a node is left out.
    begins = np.flatnonzero((np.diff(row, prepend=-1) != 0) | (np.diff(query_nodes, prepend=-2) != 1))
    num_queries = np.diff(begins, append=len(query_nodes))
    row, last = row[begins], query_nodes[begins + num_queries - 1]
    # A path holds its row's nodes at its end, so the run's last node is as far from there as from the row's last node.
    path_end = trie.row_path_start[row + 1].astype(np.int64) - (trie.row_start[row + 1] - 1 - last)
    num_keys = path_end - trie.row_path_start[row]
    if window is not None:  # keys further back than the run's first query can see are not gathered
        num_keys = np.minimum(num_keys, num_queries - 1 + window)
    key_start = np.concatenate(([0], np.cumsum(num_keys)))
    in_paths = np.arange(key_start[-1]) + np.repeat(path_end - key_start[1:], num_keys)
    key_nodes = trie.row_path[in_paths].astype(np.int64)
    copy_order = np.argsort(key_nodes, kind="stable")
    copy_start = np.searchsorted(key_nodes[copy_order], np.arange(trie.num_nodes))

    def on_device(array: np.ndarray, dtype: type[np.generic]) -> Tensor:
        return to_device(torch.from_numpy(np.ascontiguousarray(array, dtype)))

    return VarlenLayout(
        query_start=on_device(np.append(begins, len(query_nodes)), np.int32),
        key_start=on_device(key_start, np.int32),
        key_nodes=on_device(key_nodes, np.int64),
        copy_order=on_device(copy_order, np.int64),
        copy_start=on_device(copy_start, np.int64),
        # With one query a run the kernel would take its way for decoding, which has no backward.
        max_queries=max(2, int(num_queries.max(initial=0))),
        max_keys=max(2, int(num_keys.max(initial=0))),
        window=UNBOUNDED if window is None else window - 1,
    )


class VarlenAttention(torch.autograd.Function):
    """Softmax attention of every run.

    Inputs: query [Q, H, d], key and value [T, G, d]; output [Q, H, d] in the inputs' dtype.
    """

    @staticmethod
    def forward(
        context: Any,
        query: Float[Tensor, "Q H d"],
        key: Float[Tensor, "T G d"],
        value: Float[Tensor, "T G d"],
        layout: VarlenLayout,
        scale: float,
    ) -> Float[Tensor, "Q H d"]:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        keys, values = key.index_select(0, layout.key_nodes), value.index_select(0, layout.key_nodes)
        out, log_sum = run_kernel(query, keys, values, layout, scale)
        context.save_for_backward(query, key, value, out, log_sum)
        context.layout, context.scale = layout, scale
        return out

    @staticmethod
    def backward(context: Any, grad_out: Float[Tensor, "Q H d"]) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sum = context.saved_tensors
        layout = context.layout
        keys, values = key.index_select(0, layout.key_nodes), value.index_select(0, layout.key_nodes)
        grad_query, grad_keys, grad_values = run_kernel_backward(
            grad_out.contiguous(), query, keys, values, out, log_sum, layout, context.scale
        )
        return grad_query, _sum_copies(grad_keys, layout), _sum_copies(grad_values, layout), None, None


def _sum_copies(grads: Float[Tensor, "P G d"], layout: VarlenLayout) -> Float[Tensor, "T G d"]:
    """Add the gradients of all copies of a key; `embedding_bag` sums segments in fp32 and in a fixed order."""
    flat = grads.reshape(len(grads), -1)
    summed = torch.nn.functional.embedding_bag(layout.copy_order, flat, layout.copy_start, mode="sum")
    return summed.view(-1, *grads.shape[1:])


def run_kernel(
    query: Float[Tensor, "Q H d"],
    keys: Float[Tensor, "P G d"],
    values: Float[Tensor, "P G d"],
    layout: VarlenLayout,
    scale: float,
) -> tuple[Float[Tensor, "Q H d"], Float[Tensor, "H Q"]]:
    """Output and log-sum-exp of every query.

    This is the operator behind `torch.nn.attention.varlen.varlen_attn`, whose own backward pass cannot gather again.
    Query `i` of a run with `n` queries and `m` keys sees the keys `m - n + i - window .. m - n + i`. Groups of query
    heads share a key head.
    """
    out, log_sum, *_ = torch.ops.aten._flash_attention_forward(
        query,
        keys,
        values,
        layout.query_start,
        layout.key_start,
        layout.max_queries,
        layout.max_keys,
        0.0,
        layout.window == UNBOUNDED,  # causal, which a window implies
        False,
        scale=scale,
        window_size_left=layout.window,
        window_size_right=0,
    )
    return out, log_sum


def run_kernel_backward(
    grad_out: Float[Tensor, "Q H d"],
    query: Float[Tensor, "Q H d"],
    keys: Float[Tensor, "P G d"],
    values: Float[Tensor, "P G d"],
    out: Float[Tensor, "Q H d"],
    log_sum: Float[Tensor, "H Q"],
    layout: VarlenLayout,
    scale: float,
) -> tuple[Float[Tensor, "Q H d"], Float[Tensor, "P G d"], Float[Tensor, "P G d"]]:
    """Gradients of queries and of gathered keys and values."""
    no_randomness = torch.zeros(2, dtype=torch.uint64, device=query.device)
    unused = torch.empty(0, device=query.device)
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad_out,
        query,
        keys,
        values,
        out,
        log_sum,
        layout.query_start,
        layout.key_start,
        layout.max_queries,
        layout.max_keys,
        0.0,
        layout.window == UNBOUNDED,
        no_randomness,
        unused,
        scale=scale,
        window_size_left=layout.window,
        window_size_right=0,
    )
    return grads
