"""The rows and nodes that a proof compares: a short forest for all layers, and the longest example.

    rows       a stem with branches at three depths, siblings, another root; each row from its root, padded at its end
    nodes      the same as a trie

Letters: T nodes, R rows, W width of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trietune.model.rows.grid import RowIndex
from trietune.trie import Batching, Sequences, Trie, build_trie, pad_trie

# Rows of 12 tokens separate right from wrong almost as well as rows of 48; branches want some room.
SHORT_WIDTH, SHORT_STEM = 24, 14
# Tries of a run are padded to such a number of positions.
MULTIPLE_OF = 16
# A window is exceeded by this many tokens where no example says how long rows get.
BEYOND_A_WINDOW = 40


class Places(Protocol):
    """Where the numbers of each node lie in what a part is given and returns: [S, W, ...]."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def lay(self, table: Tensor) -> Tensor:
        """Nodes [T, ...] to places, every copy of a node with the same numbers."""

    def lay_once(self, table: Tensor) -> Tensor:
        """Nodes [T, ...] to places, zero at all copies but one."""

    def nodes(self, x: Tensor) -> Tensor:
        """Places [S, W, ...] to nodes [T, ...]."""

    def sum_copies(self, x: Tensor) -> Tensor:
        """Gradients of all copies of a node, summed in fp32 or fp64: [T, D]."""

    def spread(self, x: Tensor, table: Tensor) -> float:
        """The greatest difference of a copy of a node from `table`, relative to the typical node."""


@dataclass(frozen=True, slots=True)
class PlainRows:
    """Rows [R, W], padded at their end.

    Attributes:
        tokens, is_real: [R, W].
        node_of: node of each position, 0 at padding: [R, W].
        owner: of each node, the position (flat) in the row that adds it: [T].
    """

    tokens: np.ndarray
    is_real: Tensor
    node_of: Tensor
    owner: Tensor

    @classmethod
    def of(cls, trie: Trie, device: torch.device) -> PlainRows:
        index = RowIndex.of(trie)
        return cls(
            index.tokens,
            torch.from_numpy(index.is_real).to(device),
            torch.from_numpy(index.node_of).to(device),
            torch.from_numpy(index.owner).to(device),
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.shape[0], self.tokens.shape[1]

    def lay(self, table: Tensor) -> Tensor:
        return table.index_select(0, self.node_of.reshape(-1)).view(*self.shape, *table.shape[1:])

    def lay_once(self, table: Tensor) -> Tensor:
        flat = table.new_zeros(self.node_of.numel(), *table.shape[1:])
        return flat.index_copy_(0, self.owner, table).view(*self.shape, *table.shape[1:])

    def nodes(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.owner)

    def sum_copies(self, x: Tensor) -> Tensor:
        node, x = self._real(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x.new_zeros(len(self.owner), x.shape[1]).index_add_(0, node, x)

    def spread(self, x: Tensor, table: Tensor) -> float:
        node, x = self._real(x)
        difference = (x - table.index_select(0, node)).flatten(1).double().norm(dim=1)
        typical = table.flatten(1).double().norm(dim=1).median().clamp_min(1e-30)
        return float(difference.max() / typical)

    def _real(self, x: Tensor) -> tuple[Tensor, Tensor]:
        real = self.is_real.reshape(-1)
        return self.node_of.reshape(-1)[real], x.flatten(0, 1)[real]


@dataclass(frozen=True, slots=True)
class Nodes:
    """All nodes as one row [1, T], as a trie is computed."""

    num_nodes: int

    @property
    def shape(self) -> tuple[int, int]:
        return 1, self.num_nodes

    def lay(self, table: Tensor) -> Tensor:
        return table[None]

    def lay_once(self, table: Tensor) -> Tensor:
        return table[None]

    def nodes(self, x: Tensor) -> Tensor:
        return x[0]

    def sum_copies(self, x: Tensor) -> Tensor:
        return x[0].to(torch.promote_types(x.dtype, torch.float32))

    def spread(self, x: Tensor, table: Tensor) -> float:
        return 0.0


@dataclass(frozen=True, slots=True)
class Forest:
    """A trie and its plain rows.

    Attributes:
        query_nodes: nodes that carry labels, ascending.
        longest: positions of the longest row.
        is_cut: the longest example did not fit and was cut to this.
    """

    trie: Trie
    rows: PlainRows
    nodes: Nodes
    query_nodes: np.ndarray
    is_cut: bool = False

    @property
    def longest(self) -> int:
        return self.rows.shape[1]


def forest_of(trie: Trie, device: torch.device) -> Forest:
    """`trie`, padded as a run pads it, with its rows on `device`."""
    padded = pad_trie(trie, -(-trie.num_nodes // MULTIPLE_OF) * MULTIPLE_OF)
    query_nodes = np.unique(trie.label_index).astype(np.int64)
    return Forest(padded, PlainRows.of(padded, device), Nodes(padded.num_nodes), query_nodes)


def training_forests(
    sequences: Sequences,
    others: Sequences | None,
    *,
    batching: Batching,
    most_tokens: int,
    device: torch.device,
) -> tuple[Forest, Forest]:
    """A short forest of tokens of the data, and the longest of all examples with a neighbor and a late branch.

    Args:
        others: further examples that the run computes (validation); they count only for the length.
        most_tokens: a longer example is cut to this many tokens.
    """
    lengths = np.diff(np.asarray(sequences.offsets))
    if others is not None and np.diff(np.asarray(others.offsets)).max(initial=0) > lengths.max(initial=0):
        sequences, lengths = others, np.diff(np.asarray(others.offsets))
    at = int(lengths.argmax())

    def row(number: int) -> np.ndarray:
        begin = int(sequences.offsets[number])
        return np.asarray(sequences.input_ids[begin : begin + min(int(lengths[number]), most_tokens)], np.int32)

    longest = row(at)
    branch = np.concatenate((longest[: 3 * len(longest) // 4], longest[::-1][:SHORT_WIDTH]))
    neighbors = [row(number) for number in (at - 1, at + 1) if 0 <= number < len(lengths) and lengths[number] > 2]
    neighbors.sort(key=lambda other: _shared(longest, other))
    rows = [x for x in (longest, branch, *neighbors[-1:]) if len(x) > 2]
    trie = _trie_of([x.tolist() for x in rows or [np.resize(longest, 4)]], share=batching != "packed")
    return (
        forest_of(short_trie(np.asarray(sequences.input_ids[: 16 * SHORT_WIDTH], np.int32)), device),
        replace(forest_of(trie, device), is_cut=int(lengths[at]) > most_tokens),
    )


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens of their common beginning."""
    least = min(len(one), len(other))
    differs = np.flatnonzero(one[:least] != other[:least])
    return int(differs[0]) if len(differs) else least


def random_forests(vocabulary_size: int, longest: int, *, device: torch.device) -> tuple[Forest, Forest]:
    """The same of random tokens, for a model whose prompts are not known in advance; `longest` in tokens."""
    draw = np.random.default_rng(3)
    tokens = draw.integers(min(10, vocabulary_size - 1), min(vocabulary_size, 5000), 16 * SHORT_WIDTH + longest + 1)
    tokens = tokens.astype(np.int32)
    a, b = tokens[: longest + 1], np.concatenate((tokens[: longest // 2], tokens[-SHORT_WIDTH:]))
    return (
        forest_of(short_trie(tokens[: 16 * SHORT_WIDTH]), device),
        forest_of(_trie_of([a.tolist(), b.tolist()]), device),
    )


def short_trie(tokens: np.ndarray) -> Trie:
    """Five rows of at most `SHORT_WIDTH` tokens, taken from `tokens` again and again."""
    t: list[int] = np.resize(tokens, 16 * SHORT_WIDTH).tolist()
    width, stem = SHORT_WIDTH, SHORT_STEM

    def branch(depth: int, number: int, length: int) -> list[int]:
        # The first token tells siblings apart, whatever the data repeats.
        row = t[number * width : number * width + length - depth]
        known = {other[depth] for other in rows if len(other) > depth and other[:depth] == t[:depth]}
        row[0] = next((x for x in (row[0], *t) if x not in known), row[0])
        return t[:depth] + row

    rows = [t[:width]]
    for depth, number, length in ((stem, 2, width), (stem // 2, 4, width), (2, 6, width // 2 + 2), (0, 8, width)):
        rows.append(branch(depth, number, length))
    return _trie_of(rows)


def _trie_of(rows: list[list[int]], *, share: bool = True) -> Trie:
    """Each row ends in a label, which is not a node; another one lies before it."""
    flat = np.array([token for row in rows for token in row], np.int32)
    labels = np.full(len(flat), -100, np.int32)
    ends = np.cumsum([len(row) for row in rows])
    labels[ends - 1], labels[ends - 2] = flat[ends - 1], flat[ends - 2]
    return build_trie(flat, labels, np.concatenate(([0], ends)).astype(np.int64), share=share)
