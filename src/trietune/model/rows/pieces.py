"""Micro-batches cut so that the grid of each, its rows laid out whole, has no more positions than fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trietune.model.rows.grid import num_cells
from trietune.trie import IGNORED_LABEL, UNBOUNDED, MicroBatch, Trie, make_micro_batches


def cut_by_cells(micro_batches: Sequence[MicroBatch], most_cells: int) -> list[MicroBatch]:
    """The same labels in micro-batches whose grids have at most `most_cells` positions; a single row may have more."""
    cut: list[MicroBatch] = []
    for micro_batch in micro_batches:
        trie = micro_batch.trie
        if trie is None or num_cells(trie) <= most_cells or trie.num_rows == 1:
            cut.append(micro_batch)
        else:
            cut += _pieces(micro_batch, trie, most_cells)
    return cut


@dataclass(frozen=True, slots=True)
class _Sequences:
    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray


def _pieces(micro_batch: MicroBatch, trie: Trie, most_cells: int) -> list[MicroBatch]:
    sequences, row_of, present = _sequences_of(micro_batch, trie)
    order = np.argsort(row_of, kind="stable")
    pieces, first = [], 0
    while first < len(order):
        last = first + 1
        widest = _length(trie, row_of[order[first]])
        while last < len(order):
            wider = max(widest, _length(trie, row_of[order[last]]))
            if wider * (row_of[order[last]] - row_of[order[first]] + 1) > most_cells:
                break
            widest, last = wider, last + 1
        for piece in make_micro_batches(sequences, order[first:last], batching="trie", max_positions=UNBOUNDED):
            chosen = micro_batch.sequence_indices[present[piece.sequence_indices]]
            pieces.append(replace(piece, sequence_indices=chosen))
        first = last
    return pieces


def _length(trie: Trie, row: int) -> int:
    return int(trie.row_path_start[row + 1] - trie.row_path_start[row])


def _sequences_of(micro_batch: MicroBatch, trie: Trie) -> tuple[_Sequences, np.ndarray, np.ndarray]:
    """The sequences that a trie was made of, up to the last label of each; the row of each, and which it is."""
    last_row = np.searchsorted(trie.row_start, np.arange(trie.num_nodes), side="right") - 1
    present = np.unique(micro_batch.sequence_of_label)
    ids, labels, offsets, rows = [], [], [0], []
    for sequence in present:
        pairs = micro_batch.pair_of_label[micro_batch.sequence_of_label == sequence]
        nodes, values = micro_batch.label_index[pairs], micro_batch.labels[pairs]
        row = int(last_row[nodes.max()])
        begin, depths = int(trie.row_path_start[row]), trie.position_ids[nodes]
        length = int(depths.max()) + 2
        own = np.empty(length, np.int32)
        own[:-1] = trie.input_ids[trie.row_path[begin : begin + length - 1]]
        own_labels = np.full(length, IGNORED_LABEL, np.int32)
        own_labels[depths + 1] = values
        own[-1] = own_labels[-1]
        ids.append(own)
        labels.append(own_labels)
        offsets.append(offsets[-1] + length)
        rows.append(row)
    flat = _Sequences(np.concatenate(ids), np.concatenate(labels), np.array(offsets, np.int64))
    return flat, np.array(rows, np.int64), present
