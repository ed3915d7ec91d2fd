"""Which sequences should meet in a batch: groups of neighbors in sorted order, and batches filled with whole groups.

    sorted sequences        a b c 1 | a b c 2 | a b c 3 | x y 4 | z 5        (| with the tokens shared across it)
    shared with the last    0         3         3         0       0
    groups                  [---------- 3 ----------]   [------ few ------]

A group is a run of sorted neighbors that share at least half of the shorter one, cut at the batch size; what is left
between such runs is gathered in runs of a few neighbors, which still share their first words.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from trietune.trie.batching import Sequences
from trietune.trie.sorting import sort_all

# Neighbors that share at least this part of the shorter sequence belong together.
SHARED_PART = 0.5
# Runs of sorted neighbors without such a prefix are this long: on SST-2 that takes 13% off the distinct tokens, close
# to the limit of a fully sorted order, while batches stay mixed.
SHORT_RUN = 4
# How many groups are looked at for one that still fits into a batch before a group is cut.
LOOK_AHEAD = 64


@dataclass(frozen=True, slots=True)
class PrefixGroups:
    """Sequences in sorted order, and where each group begins.

    Attributes:
        order: sequence indices, sorted by their tokens.
        start: first place of each group in `order`, and B at the end.
        num_tokens: positions that plain rows would compute.
        num_distinct: nodes of one trie of everything: no batch can share more.
    """

    order: Int64[np.ndarray, " B"]
    start: Int64[np.ndarray, " G1"]
    num_tokens: int
    num_distinct: int


def find_prefix_groups(sequences: Sequences, *, batch_size: int) -> PrefixGroups:
    """Sort all sequences once and cut them into groups of at most `batch_size`."""
    order, lengths, shared = sort_all(sequences)
    together = np.zeros(len(order), bool)
    together[1:] = shared[1:] >= np.maximum(1, SHARED_PART * np.minimum(lengths[1:], lengths[:-1]))
    return PrefixGroups(
        order=order,
        start=_group_starts(np.append(np.flatnonzero(~together), len(order)), batch_size),
        num_tokens=int(lengths.sum()),
        num_distinct=int((lengths - shared).sum()),
    )


def _group_starts(run_start: np.ndarray, batch_size: int) -> Int64[np.ndarray, " G1"]:
    starts = [0]
    short_run = min(SHORT_RUN, batch_size)
    for end in run_start[1:].tolist():
        while end - starts[-1] > batch_size:
            starts.append(starts[-1] + batch_size)
        if end - starts[-1] >= short_run:
            starts.append(end)
    if starts[-1] != run_start[-1]:
        starts.append(int(run_start[-1]))
    return np.array(starts, np.int64)


def shuffled_order(num_sequences: int, *, seed: int, epoch: int) -> Int64[np.ndarray, " B"]:
    """A permutation of all sequences; depends on nothing but the arguments."""
    return np.random.default_rng([seed, epoch]).permutation(num_sequences)


def grouped_order(groups: PrefixGroups, *, batch_size: int, seed: int, epoch: int) -> Int64[np.ndarray, " B"]:
    """Groups shuffled, then laid end to end so that as few as possible cross the border of a batch.

    Depends on nothing but the arguments; every sequence occurs once.
    """
    shuffled = np.random.default_rng([seed, epoch]).permutation(len(groups.start) - 1)
    pending = [(int(groups.start[g]), int(groups.start[g + 1])) for g in shuffled[::-1]]
    order: list[np.ndarray] = []
    space = batch_size
    while pending:
        at = next((k for k in range(1, min(LOOK_AHEAD, len(pending)) + 1) if _size(pending[-k]) <= space), 1)
        first, end = pending.pop(-at)
        if end - first > space:
            pending.append((first + space, end))
            end = first + space
        order.append(groups.order[first:end])
        space = (space - (end - first)) or batch_size
    return np.concatenate(order) if order else np.zeros(0, np.int64)


def _size(group: tuple[int, int]) -> int:
    return group[1] - group[0]
