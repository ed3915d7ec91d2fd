"""Random tries and dense attention on them, for tests that compare ways to attend."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from strategies import FlatSequences
from trietune.model.attention.layout import visibility
from trietune.trie import Trie, build_trie


def trie_of(batch: FlatSequences) -> Trie:
    return build_trie(batch.input_ids, batch.labels, batch.offsets)


def random_nodes(
    num_nodes: int, num_queries: int, *, heads: tuple[int, int], head_size: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [N, H, d], keys and values [T, G, d] that ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_queries, heads[0]), (num_nodes, heads[1]), (num_nodes, heads[1]))
    tensors = (torch.randn(*shape, head_size, generator=generator, dtype=torch.float64) for shape in shapes)
    query, key, value = (x.to(dtype).requires_grad_() for x in tensors)
    return query, key, value


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    trie: Trie,
    *,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    query_nodes: np.ndarray | None = None,
) -> Tensor:
    """[N, H, d] by the formula, all nodes under one mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (key, value))
    scores = query.transpose(0, 1) @ key.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    sees = visibility(trie, window)
    sees = torch.from_numpy(sees if query_nodes is None else sees[query_nodes]).to(query.device)
    return (scores.masked_fill(~sees, -torch.inf).softmax(-1) @ value).transpose(0, 1)


def largest_difference(ours: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> float:
    """Of the outputs, and of the gradients of one random sum of them, as a part of the largest number expected."""
    upper = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upper = upper.to(expected.device, expected.dtype)
    found = (ours.detach(), *torch.autograd.grad(ours, inputs, upper))
    wanted = (expected.detach(), *torch.autograd.grad(expected, inputs, upper))
    largest = max(float(w.abs().max()) for w in wanted)
    return max(float((f - w).abs().max()) for f, w in zip(found, wanted, strict=True)) / largest
