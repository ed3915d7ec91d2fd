"""Micro-batches of few shapes, for devices that compile a program for each shape that they meet.

A short list of shapes is chosen from the data before training; then every micro-batch is padded to one of them:

    positions   the nodes, then padding: each a root of its own, which sees only itself and is seen by nothing else
    labels      the pairs, then padding of weight 0, of which neither loss nor gradient knows

Where several devices share a batch, as many tries are put side by side, as rows of one forest:

    nodes 0 .. W-1          first trie, padded
    nodes W .. 2W-1         second trie, padded

Letters: S rows of W positions and N labels each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from trietune.trie.batching import MicroBatch
from trietune.trie.trie import Trie

# Lengths are multiples of these, up to `LONG` positions and beyond: what matrix units take at once.
SHORT_STEP, LONG_STEP, LONG = 32, 128, 512
LABEL_STEP = 32
# Another shape is another program to compile, which takes minutes for a large model, so a little padding is accepted.
ACCEPTED_WASTE = 0.1
MOST_SHAPES = 5
# The shapes are chosen from a part of the batches; others may have somewhat more labels.
LABEL_RESERVE = 1.125


@dataclass(frozen=True, slots=True, order=True)
class StaticShape:
    """The size of one row, padding included."""

    num_positions: int
    num_labels: int


@dataclass(frozen=True, slots=True)
class StaticShapes:
    """The shapes of a run.

    Attributes:
        shapes: ascending; batches are cut into micro-batches that the last one holds.
        deepest: greatest depth that a node of this data can have. It decides whether a sliding window matters, so
            that the program does not depend on what a micro-batch happens to hold.
        num_rows: tries that are computed side by side.
    """

    shapes: tuple[StaticShape, ...]
    deepest: int
    num_rows: int = 1

    @property
    def max_positions(self) -> int:
        """Of one row of the largest shape."""
        return self.shapes[-1].num_positions

    def holding(self, num_positions: int, num_labels: int) -> StaticShape:
        """The smallest shape that holds so much.

        What no shape of the list holds (evaluation can have longer examples, and more labels) gets one beside the
        list, on a ladder whose steps are so wide that few of them are ever met.
        """
        fitting = [s for s in self.shapes if s.num_positions >= num_positions and s.num_labels >= num_labels]
        if fitting:
            return min(fitting)
        lengths = [s.num_positions for s in self.shapes if s.num_positions >= num_positions]
        length = min(lengths) if lengths else _doubled(self.max_positions, num_positions)
        return StaticShape(length, _doubled(LABEL_STEP, num_labels))

    def pad_to_shapes(self, micro_batches: Iterable[MicroBatch]) -> list[MicroBatch]:
        """The same micro-batches padded to the shapes, `num_rows` of similar size side by side in one.

        Raises:
            ValueError: for padded rows, which have no trie.
        """
        by_size = sorted(micro_batches, key=lambda mb: (mb.num_positions, len(mb.labels)))
        starts = range(0, len(by_size), self.num_rows)
        return [self._side_by_side(by_size[first : first + self.num_rows]) for first in starts]

    def _side_by_side(self, micro_batches: Sequence[MicroBatch]) -> MicroBatch:
        shape = self.holding(max(mb.num_positions for mb in micro_batches), max(len(mb.labels) for mb in micro_batches))
        tries = [_trie_of(mb) for mb in micro_batches]
        tries += [_NO_NODES] * (self.num_rows - len(tries))
        forest = join_tries(tries, shape)
        before = np.cumsum([0, *(len(mb.sequence_indices) for mb in micro_batches[:-1])])
        return MicroBatch(
            input_ids=forest.input_ids.reshape(self.num_rows, -1),
            position_ids=forest.position_ids.reshape(self.num_rows, -1),
            label_index=forest.label_index,
            labels=forest.labels,
            label_weight=forest.label_weight,
            pair_of_label=forest.pair_of_label,
            sequence_of_label=_joined([mb.sequence_of_label for mb in micro_batches], before),
            sequence_indices=np.concatenate([mb.sequence_indices for mb in micro_batches]),
            num_tokens=sum(mb.num_tokens for mb in micro_batches),
            trie=forest,
            attention_mask=None,
        )


def choose_shapes(sizes: Sequence[tuple[int, int]], *, longest: int, deepest: int, num_rows: int = 1) -> StaticShapes:
    """As few shapes as pad micro-batches of these sizes by no more than is accepted.

    Args:
        sizes: positions and labels of each micro-batch that was laid out; at least one.
        longest: positions of the longest single sequence, which the largest shape must hold.
        deepest: greatest depth of a node.
    """
    lengths = np.array([rounded_length(size) for size, _ in sizes])
    lengths[lengths.argmax()] = max(lengths.max(), rounded_length(longest))
    num_real = sum(size for size, _ in sizes)
    distinct, count = np.unique(lengths, return_counts=True)
    for number in range(1, MOST_SHAPES + 1):
        ends = _cheapest_ends(distinct, count, number)
        padded = ends[np.searchsorted(ends, lengths)]
        if padded.sum() <= (1 + ACCEPTED_WASTE) * num_real:
            break
    shapes = []
    for length in ends.tolist():
        most = max((labels for (_, labels), own in zip(sizes, padded, strict=True) if own == length), default=1)
        shapes.append(StaticShape(length, _rounded(int(most * LABEL_RESERVE), LABEL_STEP)))
    return StaticShapes(tuple(shapes), deepest, num_rows)


def rounded_length(num_positions: int) -> int:
    """The next length that matrix units take without padding of their own."""
    return _rounded(num_positions, SHORT_STEP if num_positions <= LONG else LONG_STEP)


def _cheapest_ends(lengths: np.ndarray, count: np.ndarray, number: int) -> np.ndarray:
    """At most `number` of `lengths` (ascending, each met `count` times), the last included, that pad the least."""
    num = len(lengths)
    before = np.concatenate(([0], np.cumsum(count)))
    cost = np.full((number + 1, num + 1), np.inf)
    cost[:, 0] = 0
    first_of = np.zeros((number + 1, num + 1), np.int64)
    for used in range(1, number + 1):
        for end in range(1, num + 1):
            first = np.arange(end)
            choice = cost[used - 1, first] + (before[end] - before[first]) * lengths[end - 1]
            first_of[used, end] = choice.argmin()
            cost[used, end] = choice.min()
    ends, end = [], num
    for used in range(number, 0, -1):
        if end == 0:
            break
        ends.append(lengths[end - 1])
        end = int(first_of[used, end])
    return np.array(ends[::-1])


def join_tries(tries: Sequence[Trie], shape: StaticShape) -> Trie:
    """One forest: each trie padded to `shape`, one after the other.

    Sequences of labels are numbered within each trie as before; the nodes and pairs of row `r` begin at `r` times the
    shape's positions and labels.
    """
    padded = [_pad(trie, shape) for trie in tries]
    rows = np.arange(len(tries))
    nodes, pairs = rows * shape.num_positions, rows * shape.num_labels
    paths = np.cumsum([0, *(len(trie.row_path) for trie in padded[:-1])])
    end = [len(padded) * shape.num_positions]
    return Trie(
        input_ids=np.concatenate([trie.input_ids for trie in padded]),
        position_ids=np.concatenate([trie.position_ids for trie in padded]),
        subtree_end=_joined([trie.subtree_end for trie in padded], nodes),
        row_start=np.append(_joined([trie.row_start[:-1] for trie in padded], nodes), end).astype(np.int32),
        row_path=_joined([trie.row_path for trie in padded], nodes),
        row_path_start=np.append(
            _joined([trie.row_path_start[:-1] for trie in padded], paths), paths[-1] + len(padded[-1].row_path)
        ).astype(np.int32),
        label_index=_joined([trie.label_index for trie in padded], nodes),
        labels=np.concatenate([trie.labels for trie in padded]),
        label_weight=np.concatenate([trie.label_weight for trie in padded]),
        pair_of_label=_joined([trie.pair_of_label for trie in padded], pairs),
        sequence_of_label=np.concatenate([trie.sequence_of_label for trie in padded]),
    )


def _pad(trie: Trie, shape: StaticShape) -> Trie:
    new = np.arange(trie.num_nodes, shape.num_positions, dtype=np.int32)
    num_paths, num_pairs = len(trie.row_path), shape.num_labels - len(trie.labels)
    zeros = np.zeros(len(new), np.int32)
    return Trie(
        input_ids=np.concatenate((trie.input_ids, zeros)),
        position_ids=np.concatenate((trie.position_ids, zeros)),
        subtree_end=np.concatenate((trie.subtree_end, new + 1)),
        row_start=np.concatenate((trie.row_start, new + 1)),
        row_path=np.concatenate((trie.row_path, new)),
        row_path_start=np.concatenate((trie.row_path_start, num_paths + 1 + np.arange(len(new), dtype=np.int32))),
        # The last position: padding itself, or a node whose output exists in any case.
        label_index=np.concatenate((trie.label_index, np.full(num_pairs, shape.num_positions - 1, np.int32))),
        labels=np.concatenate((trie.labels, np.zeros(num_pairs, np.int32))),
        label_weight=np.concatenate((trie.label_weight, np.zeros(num_pairs))),
        pair_of_label=trie.pair_of_label,
        sequence_of_label=trie.sequence_of_label,
    )


def _joined(parts: Sequence[np.ndarray], offsets: np.ndarray) -> np.ndarray:
    shifted = [part + offset for part, offset in zip(parts, offsets.tolist(), strict=True)]
    return np.concatenate(shifted).astype(np.int32)


def _trie_of(micro_batch: MicroBatch) -> Trie:
    if micro_batch.trie is None:
        raise ValueError("padded rows have no static shape here; tries and packed sequences have")
    return micro_batch.trie


def _rounded(number: int, step: int) -> int:
    return max(1, -(-number // step)) * step


def _doubled(start: int, least: int) -> int:
    while start < least:
        start *= 2
    return start


_NONE = np.zeros(0, np.int32)
_NO_NODES = Trie(
    input_ids=_NONE,
    position_ids=_NONE,
    subtree_end=_NONE,
    row_start=np.zeros(1, np.int32),
    row_path=_NONE,
    row_path_start=np.zeros(1, np.int32),
    label_index=_NONE,
    labels=_NONE,
    label_weight=np.zeros(0),
    pair_of_label=_NONE,
    sequence_of_label=_NONE,
)
