"""One batch as segments to draw: each stretch of tokens that the same examples share is one of them.

    5 6 7 1          [5 6] of both examples, [7] of the first, [9] of the second
    5 6 9 1

Segments tile the trie: their tokens are its nodes, each once, and a segment's examples stand in one block.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trietune.trie.trie import IGNORED_LABEL, common_prefix_lengths, num_nodes_alone, sort_sequences


@dataclass(frozen=True, slots=True)
class Segment:
    """Attributes: tokens `depth` to `end` of examples `first` to `last`, in the order in which they are drawn."""

    first: int
    last: int
    depth: int
    end: int


@dataclass(frozen=True, slots=True)
class BatchPicture:
    """Attributes:
    order: the examples as drawn, as indices into what was given.
    lengths: positions of each drawn example.
    segments: a parent before its children.
    """

    order: Sequence[int]
    lengths: Sequence[int]
    segments: Sequence[Segment]

    @property
    def num_padded(self) -> int:
        """Positions of padded rows."""
        return len(self.lengths) * max(self.lengths, default=0)

    @property
    def num_real(self) -> int:
        """Positions of rows without padding."""
        return sum(self.lengths)

    @property
    def num_distinct(self) -> int:
        """Positions of the trie."""
        return sum(segment.end - segment.depth for segment in self.segments)


def picture_batch(
    input_ids: np.ndarray, labels: np.ndarray, offsets: np.ndarray, *, share: bool = True
) -> BatchPicture:
    """The picture of sequences `input_ids[offsets[i] : offsets[i + 1]]`, which `build_trie` would make a trie of."""
    lengths = num_nodes_alone(labels, offsets)
    starts = offsets[:-1]
    order = sort_sequences(input_ids, starts, lengths) if share else np.arange(len(starts))
    order = order[lengths[order] > 0]
    starts, lengths = starts[order], lengths[order]
    shared = common_prefix_lengths(input_ids, starts, lengths) if share else np.zeros_like(lengths)
    segments = list(_segments(lengths.tolist(), shared.tolist())) if len(order) else []
    return BatchPicture(order.tolist(), lengths.tolist(), segments)


def label_runs(labels: np.ndarray, begin: int, end: int) -> list[tuple[int, int]]:
    """Stretches of label tokens among `labels[begin:end]`, as bounds from `begin`."""
    is_label = np.concatenate([[False], labels[begin:end] != IGNORED_LABEL, [False]])
    edges = np.flatnonzero(is_label[1:] != is_label[:-1])
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _segments(lengths: list[int], shared: list[int]) -> Iterator[Segment]:
    """`shared[i]` is how much example `i` has in common with the one drawn before it."""
    todo = [(0, len(lengths), 0)]
    while todo:
        first, last, depth = todo.pop()
        inner = shared[first + 1 : last]
        end = min([lengths[first], *inner]) if inner else lengths[first]
        if end > depth:
            yield Segment(first, last, depth, end)
        if not inner:
            continue
        begins = [first, *(at for at in range(first + 1, last) if shared[at] == end), last]
        parts = [(a, b, end) for a, b in itertools.pairwise(begins) if lengths[b - 1] > end]
        todo.extend(reversed(parts))
