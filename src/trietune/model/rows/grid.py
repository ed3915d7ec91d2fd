"""The rows of a trie laid out whole: every row from its root, padded at its end.

    trie      5 6 7 and 9 after 6          grid   5 6 7
    nodes     0 1 2 3                             5 6 9

Letters: T nodes, R rows, W width of the grid, P positions of it that hold a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trietune.trie import Trie


@dataclass(frozen=True, slots=True)
class RowIndex:
    """Where nodes lie in the grid, on the host.

    Attributes:
        tokens: [R, W], 0 at padding.
        is_real: [R, W].
        node_of: node of each position, 0 at padding: [R, W].
        owner: of each node, the position (flat) in the row that adds it: [T].
    """

    tokens: np.ndarray
    is_real: np.ndarray
    node_of: np.ndarray
    owner: np.ndarray

    @classmethod
    def of(cls, trie: Trie) -> RowIndex:
        lengths = np.diff(trie.row_path_start)
        width = int(lengths.max())
        is_real = np.arange(width) < lengths[:, None]
        node_of = np.zeros(is_real.shape, np.int64)
        node_of[is_real] = trie.row_path
        row_of_node = np.searchsorted(trie.row_start, np.arange(trie.num_nodes), side="right") - 1
        before_own = lengths - np.diff(trie.row_start)
        place = np.arange(trie.num_nodes) - trie.row_start[row_of_node] + before_own[row_of_node]
        tokens = np.where(is_real, trie.input_ids[node_of], 0)
        return cls(tokens, is_real, node_of, row_of_node * width + place)


def num_cells(trie: Trie) -> int:
    """Positions of the grid, padding included."""
    return trie.num_rows * int(np.diff(trie.row_path_start).max())


class RowGrid:
    """The grid of one trie on a device; takes numbers from positions to nodes and back.

    Attributes:
        shape: (R, W).
        num_nodes: T.
    """

    def __init__(self, trie: Trie, to_device: Callable[[Tensor], Tensor]) -> None:
        index = RowIndex.of(trie)
        flat, is_real = index.node_of.reshape(-1), index.is_real.reshape(-1)
        # Copies of a node side by side, so that their gradients are sums of segments.
        real = np.flatnonzero(is_real)
        order = real[np.argsort(flat[real], kind="stable")]
        starts = np.searchsorted(flat[order], np.arange(trie.num_nodes))
        self.shape: tuple[int, int] = (index.tokens.shape[0], index.tokens.shape[1])
        self.num_nodes = trie.num_nodes
        self.tokens = to_device(torch.from_numpy(index.tokens.astype(np.int64)))
        self.mask = to_device(torch.from_numpy(index.is_real.astype(np.int64)))
        self._owner = to_device(torch.from_numpy(index.owner))
        self._node_of = to_device(torch.from_numpy(flat))
        self._copies = to_device(torch.from_numpy(order))
        self._copies_start = to_device(torch.from_numpy(starts))

    def to_nodes(self, x: Tensor) -> Tensor:
        """Positions [R * W, ...] to nodes [T, ...], from the row that adds each."""
        return x.index_select(0, self._owner)

    def to_rows(self, x: Tensor) -> Tensor:
        """Nodes [T, ...] to positions [R * W, ...]; padding holds what the first node does."""
        spread: Tensor = _Spread.apply(  # type: ignore[no-untyped-call]
            x.flatten(1), self._node_of, self._copies, self._copies_start
        )
        return spread.view(-1, *x.shape[1:])


class _Spread(torch.autograd.Function):
    """Nodes [T, D] to positions [P, D]; a node's gradient is the sum over its copies, in fp32, in a fixed order."""

    @staticmethod
    def forward(context: Any, x: Tensor, node_of: Tensor, copies: Tensor, starts: Tensor) -> Tensor:
        context.save_for_backward(copies, starts)
        return x.index_select(0, node_of)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        copies, starts = context.saved_tensors
        return torch.nn.functional.embedding_bag(copies, grad.contiguous(), starts, mode="sum"), None, None, None
