"""Batches become micro-batches: what the model computes at once, as a trie, packed, or as padded rows.

A batch whose trie has more nodes than fit in memory is cut between sorted sequences. A cut before sequence `i` computes
the prefix that `i` shares with its neighbor a second time, so the cuts are chosen to repeat as little as possible. The
gradients stay those of the whole batch, because every micro-batch's loss is divided by the weight of the whole step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from trietune.trie.trie import Trie, build_trie, common_prefix_lengths, num_nodes_alone, sort_sequences

Batching = Literal["trie", "packed", "padded"]

# A micro-batch costs something before its first node (kernel launches, the optimizer's reads of the weights), here
# expressed in nodes: repeating fewer than this many nodes is not worth one micro-batch more.
NODES_WORTH_A_MICRO_BATCH = 64
# As `max_positions`: a batch is never cut.
UNBOUNDED = 2**31


@runtime_checkable
class Sequences(Protocol):
    """Token sequences with labels, flat; `trietune.data.TokenSequences` is one."""

    @property
    def input_ids(self) -> np.ndarray: ...

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def offsets(self) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What is computed at once. `S` rows of width `W`: one row of T nodes for a trie, B rows for padded batches.

    Attributes:
        input_ids, position_ids: the model's input.
        label_index: position, in the flattened [S * W] grid, whose output predicts the label.
        labels, label_weight: the label, and how many labels were merged into this (position, label) pair.
        pair_of_label, sequence_of_label: for every label of every sequence, its pair, and its sequence as an index
            into `sequence_indices`.
        sequence_indices: which sequences of the data set these are.
        num_tokens: positions that plain rows without padding would compute.
        trie: how positions see each other; None for padded rows.
        attention_mask: True at real tokens; None for tries.
    """

    input_ids: Int32[np.ndarray, "S W"]
    position_ids: Int32[np.ndarray, "S W"]
    label_index: Int32[np.ndarray, " N"]
    labels: Int32[np.ndarray, " N"]
    label_weight: Float64[np.ndarray, " N"]
    pair_of_label: Int32[np.ndarray, " M"]
    sequence_of_label: Int32[np.ndarray, " M"]
    sequence_indices: Int64[np.ndarray, " B"]
    num_tokens: int
    trie: Trie | None
    attention_mask: Bool[np.ndarray, "S W"] | None

    @property
    def num_positions(self) -> int:
        """What the model computes, padding included."""
        return int(self.input_ids.size)

    @property
    def total_weight(self) -> float:
        """Labels of all sequences."""
        return float(self.label_weight.sum())


def make_micro_batches(
    sequences: Sequences, indices: Int64[np.ndarray, " B"], *, batching: Batching, max_positions: int
) -> list[MicroBatch]:
    """Cut the batch of `sequences[indices]` into micro-batches of at most `max_positions` positions.

    A single sequence longer than `max_positions` becomes a micro-batch of its own. Sequences without a label are
    never computed and appear in no micro-batch; a batch of nothing else gives an empty list.
    """
    batch = gather(sequences, np.asarray(indices, np.int64))
    lengths = num_nodes_alone(batch.labels, batch.offsets)
    with_labels = np.flatnonzero(lengths > 0)
    if len(with_labels) == 0:
        return []
    match batching:
        case "trie":
            order = with_labels[sort_sequences(batch.input_ids, batch.offsets[with_labels], lengths[with_labels])]
            shared = common_prefix_lengths(batch.input_ids, batch.offsets[order], lengths[order])
            pieces = _cut(order, lengths[order], shared, max_positions)
        case "packed":
            pieces = _cut(with_labels, lengths[with_labels], np.zeros(len(with_labels), np.int64), max_positions)
        case "padded":
            pieces = _cut_rows(with_labels, lengths, max_positions)
    make = _padded if batching == "padded" else _shared if batching == "trie" else _packed
    return [make(_subset(batch, piece)) for piece in pieces]


@dataclass(frozen=True, slots=True)
class _Batch:
    input_ids: Int32[np.ndarray, " K"]
    labels: Int32[np.ndarray, " K"]
    offsets: Int64[np.ndarray, " B1"]
    sequence_indices: Int64[np.ndarray, " B"]


def gather(sequences: Sequences, indices: Int64[np.ndarray, " B"]) -> _Batch:
    """The sequences of one batch, laid end to end."""
    begin, end = np.asarray(sequences.offsets)[indices], np.asarray(sequences.offsets)[indices + 1]
    lengths = end - begin
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    at = np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], lengths)
    return _Batch(np.asarray(sequences.input_ids[at]), np.asarray(sequences.labels[at]), offsets, indices)


def _subset(batch: _Batch, chosen: Int64[np.ndarray, " C"]) -> _Batch:
    part = gather(batch, chosen)
    return _Batch(part.input_ids, part.labels, part.offsets, batch.sequence_indices[chosen])


def _cut(
    order: Int64[np.ndarray, " B"],
    lengths: Int64[np.ndarray, " B"],
    shared: Int64[np.ndarray, " B"],
    max_positions: int,
) -> list[Int64[np.ndarray, " C"]]:
    """Contiguous pieces of `order` that compute the fewest positions in all; dynamic programming over the cuts.

    A piece `first .. last` computes `lengths[first]` nodes for its first sequence and `lengths - shared` for each
    other, which is the difference of two prefix sums plus `shared[first]`.
    """
    total = np.concatenate(([0], np.cumsum(lengths - shared)))
    if total[-1] <= max_positions:
        return [order]
    num = len(order)
    repeated = shared.copy()
    repeated[0] = 0
    cost = np.zeros(num + 1)
    best_first = np.zeros(num + 1, np.int64)
    for end in range(1, num + 1):
        earliest = int(np.searchsorted(total, total[end] - max_positions))
        first = np.arange(min(earliest, end - 1), end)
        fits = total[end] - total[first] + repeated[first] <= max_positions
        fits[-1] = True  # one sequence longer than the bound stands alone
        choice = np.where(fits, cost[first] + repeated[first] + NODES_WORTH_A_MICRO_BATCH, np.inf)
        at = int(choice.argmin())
        cost[end], best_first[end] = choice[at], first[at]
    pieces, end = [], num
    while end > 0:
        pieces.append(order[best_first[end] : end])
        end = int(best_first[end])
    return pieces[::-1]


def _cut_rows(
    chosen: Int64[np.ndarray, " C"], lengths: Int64[np.ndarray, " B"], max_positions: int
) -> list[Int64[np.ndarray, " _"]]:
    """Rows of similar length together, as many as fit when padded to the longest."""
    order = chosen[np.argsort(-lengths[chosen], kind="stable")]
    pieces, first = [], 0
    while first < len(order):
        rows = max(1, max_positions // int(lengths[order[first]]))
        pieces.append(order[first : first + rows])
        first += rows
    return pieces


def _shared(batch: _Batch) -> MicroBatch:
    return _from_trie(batch, build_trie(batch.input_ids, batch.labels, batch.offsets))


def _packed(batch: _Batch) -> MicroBatch:
    return _from_trie(batch, build_trie(batch.input_ids, batch.labels, batch.offsets, share=False))


def _from_trie(batch: _Batch, trie: Trie) -> MicroBatch:
    return MicroBatch(
        input_ids=trie.input_ids[None],
        position_ids=trie.position_ids[None],
        label_index=trie.label_index,
        labels=trie.labels,
        label_weight=trie.label_weight,
        pair_of_label=trie.pair_of_label,
        sequence_of_label=trie.sequence_of_label,
        sequence_indices=batch.sequence_indices,
        num_tokens=int(num_nodes_alone(batch.labels, batch.offsets).sum()),
        trie=trie,
        attention_mask=None,
    )


def _padded(batch: _Batch) -> MicroBatch:
    """The packed trie's fields, laid out as one row a sequence."""
    packed = build_trie(batch.input_ids, batch.labels, batch.offsets, share=False)
    lengths = np.diff(packed.row_start)
    width = int(lengths.max())
    at = np.repeat(np.arange(len(lengths)) * width, lengths) + packed.position_ids
    input_ids = np.zeros(len(lengths) * width, np.int32)
    mask = np.zeros(len(lengths) * width, bool)
    input_ids[at], mask[at] = packed.input_ids, True
    shape = (len(lengths), width)
    return MicroBatch(
        input_ids=input_ids.reshape(shape),
        position_ids=np.tile(np.arange(width, dtype=np.int32), (len(lengths), 1)),
        label_index=at[packed.label_index].astype(np.int32),
        labels=packed.labels,
        label_weight=packed.label_weight,
        pair_of_label=packed.pair_of_label,
        sequence_of_label=packed.sequence_of_label,
        sequence_indices=batch.sequence_indices,
        num_tokens=int(lengths.sum()),
        trie=None,
        attention_mask=mask.reshape(shape),
    )


def total_weight(micro_batches: Sequence[MicroBatch]) -> float:
    """Labels of a step: the one divisor of its loss."""
    return float(sum(micro_batch.total_weight for micro_batch in micro_batches))
