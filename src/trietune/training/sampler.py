"""The order of the data: which sequences make batch `b` of epoch `e`, from the seed only.

Nothing is remembered between steps, so a resumed run, or one with another micro-batch bound, draws the same batches.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from trietune.trie.groups import PrefixGroups, grouped_order, shuffled_order


class Sampler:
    """Batches of sequence indices; the last of an epoch may be smaller.

    Args:
        num_sequences: size of the data set.
        batch_size: examples in a batch, over all ranks.
        seed: seed of the order.
        groups: shared prefixes, when examples that have one should meet; None shuffles plainly.
    """

    def __init__(self, num_sequences: int, *, batch_size: int, seed: int, groups: PrefixGroups | None = None) -> None:
        self.num_sequences = num_sequences
        self.batch_size = batch_size
        self.seed = seed
        self.groups = groups
        self._order = lru_cache(maxsize=1)(self._make_order)

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.num_sequences // self.batch_size)

    def batch(self, epoch: int, number: int) -> np.ndarray:
        """Sequence indices, int64 [at most batch_size], of batch `number` (from 0) of `epoch` (from 0)."""
        return self._order(epoch)[number * self.batch_size : (number + 1) * self.batch_size]

    def _make_order(self, epoch: int) -> np.ndarray:
        if self.groups is None:
            return shuffled_order(self.num_sequences, seed=self.seed, epoch=epoch)
        return grouped_order(self.groups, batch_size=self.batch_size, seed=self.seed, epoch=epoch)
