"""How much there is to compute in some micro-batches, for estimates of memory and for what a plan tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trietune.trie.batching import MicroBatch


@dataclass(frozen=True, slots=True)
class Work:
    """Counts over some micro-batches.

    Attributes:
        num_tokens: positions that plain rows without padding would compute.
        num_positions: positions computed, padding included.
        num_labels: (position, label) pairs, which the output head computes.
        num_scores: products of a query and a key in one head: every row's queries with all of its path.
        largest: positions of the largest micro-batch.
        num_micro_batches: forward and backward passes.
    """

    num_tokens: int
    num_positions: int
    num_labels: int
    num_scores: int
    largest: int
    num_micro_batches: int

    @property
    def labels_per_position(self) -> float:
        return self.num_labels / max(self.num_positions, 1)

    @property
    def scores_per_position(self) -> float:
        return self.num_scores / max(self.num_positions, 1)


def measure_work(micro_batches: Sequence[MicroBatch]) -> Work:
    """Add up what `micro_batches` hold."""
    return Work(
        num_tokens=sum(micro_batch.num_tokens for micro_batch in micro_batches),
        num_positions=sum(micro_batch.num_positions for micro_batch in micro_batches),
        num_labels=sum(len(micro_batch.labels) for micro_batch in micro_batches),
        num_scores=sum(_num_scores(micro_batch) for micro_batch in micro_batches),
        largest=max((micro_batch.num_positions for micro_batch in micro_batches), default=0),
        num_micro_batches=len(micro_batches),
    )


def _num_scores(micro_batch: MicroBatch) -> int:
    trie = micro_batch.trie
    if trie is None:
        return int(micro_batch.num_positions * micro_batch.input_ids.shape[1])
    queries, keys = np.diff(trie.row_start).astype(np.int64), np.diff(trie.row_path_start)
    return int((queries * keys).sum())
