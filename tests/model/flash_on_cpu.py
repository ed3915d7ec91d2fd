"""A stand-in for PyTorch's flash kernels, on the CPU and in any dtype, written from their contract alone.

`torch.nn.attention.varlen.varlen_attn` calls the operators `aten::_flash_attention_forward` and `_backward`, which
exist for CUDA only. Their contract for sequences of different lengths:

    sequence s has the queries q[cu_seq_q[s] : cu_seq_q[s + 1]] and the keys k[cu_seq_k[s] : cu_seq_k[s + 1]]
    with n queries and m keys, query i is at the key m - n + i (the last query is at the last key)
    it sees the keys from left before that to right after it; a negative number is not a threshold; causal: right = 0
    groups of query heads share a key head; lse[h, t] is the log of the sum of exp(scale q k) over what is seen
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@contextmanager
def flash_on_cpu() -> Iterator[list[dict[str, Any]]]:
    """The two operators work on CPU tensors; yields the list of the forward calls, each as its arguments by name."""
    calls: list[dict[str, Any]] = []

    def forward(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "dropout", "is_causal", "debug")
        calls.append(dict(zip(names, args, strict=True)) | options)
        return _forward(*args, **options)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", _backward, "CPU")
    try:
        yield calls
    finally:
        library._destroy()


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    is_causal: bool,
    debug: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
    **others: Any,
) -> tuple[Tensor, ...]:
    _check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    assert dropout == 0
    assert all(value is None for value in others.values())
    out = torch.empty_like(query)
    accumulate = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=accumulate)
    for queries, keys in _sequences(cu_seq_q, cu_seq_k):
        scores = _scores(query[queries], key[keys], scale, is_causal, window_size_left, window_size_right)
        lse[:, queries] = scores.logsumexp(-1)
        weights = (scores - lse[:, queries, None]).exp()
        out[queries] = (weights @ _heads_first(value[keys], query.shape[1])).transpose(0, 1).to(out.dtype)
    nothing = query.new_empty(0)
    return out, lse, torch.zeros(2, dtype=torch.uint64), nothing.clone(), nothing


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    assert grad_out.is_contiguous()
    num_heads, num_key_heads = query.shape[1], key.shape[1]
    grads = [torch.zeros_like(x) for x in (query, key, value)]
    for queries, keys in _sequences(cu_seq_q, cu_seq_k):
        scores = _scores(query[queries], key[keys], scale, is_causal, window_size_left, window_size_right)
        weights = (scores - lse[:, queries, None]).exp()
        q, k, v = query[queries], key[keys], value[keys]
        upper, own = (x[queries].transpose(0, 1).to(weights.dtype) for x in (grad_out, out))
        grad_weights = upper @ _heads_first(v, num_heads).transpose(1, 2)
        grad_scores = weights * (grad_weights - (upper * own).sum(-1, keepdim=True)) * scale
        grads[0][queries] = (grad_scores @ _heads_first(k, num_heads)).transpose(0, 1).to(q.dtype)
        of_keys = grad_scores.transpose(1, 2) @ q.transpose(0, 1).to(weights.dtype)
        of_values = weights.transpose(1, 2) @ upper
        for grad, of_heads in zip(grads[1:], (of_keys, of_values), strict=True):
            of_groups = of_heads.unflatten(0, (num_key_heads, -1)).sum(1)
            grad[keys] = of_groups.transpose(0, 1).to(grad.dtype)
    return grads[0], grads[1], grads[2]


def _check(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int
) -> None:
    """What the kernels check, or take for granted."""
    assert query.dim() == key.dim() == value.dim() == 3
    assert all(x.is_contiguous() for x in (query, key, value, cu_seq_q, cu_seq_k))
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.shape[1] % key.shape[1] == 0
    num_queries, num_keys = cu_seq_q.diff(), cu_seq_k.diff()
    assert num_queries.min() > 0
    assert bool((num_queries <= num_keys).all()), "a query would see nothing"
    assert num_queries.max() <= max_q
    assert num_keys.max() <= max_k
    # With one query a sequence and shared key heads, the kernel swaps heads and queries, which has no backward.
    assert max_q > 1
    assert int(cu_seq_q[-1]) == len(query)
    assert int(cu_seq_k[-1]) == len(key) == len(value)


def _sequences(cu_seq_q: Tensor, cu_seq_k: Tensor) -> Iterator[tuple[slice, slice]]:
    bounds = (cu.tolist() for cu in (cu_seq_q, cu_seq_k))
    for queries, keys in zip(*(pairwise(b) for b in bounds), strict=True):
        yield slice(*queries), slice(*keys)


def _scores(query: Tensor, key: Tensor, scale: float, is_causal: bool, left: int, right: int) -> Tensor:
    """[H, n, m], -inf where a query does not see a key."""
    accumulate = torch.promote_types(query.dtype, torch.float32)
    scores = query.transpose(0, 1).to(accumulate) @ _heads_first(key, query.shape[1]).transpose(1, 2) * scale
    num_queries, num_keys = scores.shape[1:]
    distance = torch.arange(num_queries)[:, None] + num_keys - num_queries - torch.arange(num_keys)
    sees = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        sees &= distance <= left
    if right >= 0 or is_causal:
        sees &= -distance <= max(right, 0)
    return scores.masked_fill(~sees, -torch.inf)


def _heads_first(x: Tensor, num_heads: int) -> Tensor:
    accumulate = torch.promote_types(x.dtype, torch.float32)
    return x.transpose(0, 1).repeat_interleave(num_heads // x.shape[1], 0).to(accumulate)
