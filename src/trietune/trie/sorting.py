"""Sort all sequences of a data set, and count what neighbors share, with memory for a part of the tokens.

    a sample, sorted       b ......... k ......... r ......
    ranges of the order      0     |      1    |     2         every sequence goes to one, where it is sorted

Equal sequences go to one range, so the order is that of one sort of everything. Pages of a mapped file count as memory
of the process once they were read, so they are let go of after each range.
"""

import mmap
from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32, Int64

from trietune.trie.batching import Sequences
from trietune.trie.trie import common_prefix_lengths, num_nodes_alone, sort_keys, sort_sequences

# Tokens sorted at once, at about 100 bytes each.
TOKENS_AT_ONCE = 4_000_000
# Sequences that are looked at to find where a range ends; ranges then differ by a fifth.
SAMPLED_PER_RANGE = 32


def sort_all(
    sequences: Sequences,
) -> tuple[Int64[np.ndarray, " B"], Int64[np.ndarray, " B"], Int64[np.ndarray, " B"]]:
    """Lexicographic order of all sequences; in that order, the positions of each, and how many the one before shares.

    As in a trie, a sequence ends at the position that predicts its last label.
    """
    offsets = np.asarray(sequences.offsets)
    lengths = _lengths(sequences, offsets)
    orders, shares = [], []
    last = np.zeros(0, np.int32)
    for members in _ranges_of_order(sequences, offsets, lengths):
        ids, starts = _gather_ids(sequences, offsets[members], lengths[members])
        order = sort_sequences(ids, starts, lengths[members])
        starts, ends = starts[order], (starts + lengths[members])[order]
        shared = common_prefix_lengths(ids, starts, ends - starts)
        shared[0] = _num_equal(last, ids[starts[0] : ends[0]])
        last = ids[starts[-1] : ends[-1]].copy()
        _let_go(sequences.input_ids)
        orders.append(members[order])
        shares.append(shared)
    if not orders:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)
    in_order = np.concatenate(orders)
    return in_order, lengths[in_order], np.concatenate(shares)


def _lengths(sequences: Sequences, offsets: Int64[np.ndarray, " B1"]) -> Int64[np.ndarray, " B"]:
    parts = [np.zeros(0, np.int64)]
    for a, b in _blocks(offsets):
        labels = np.asarray(sequences.labels[offsets[a] : offsets[b]])
        parts.append(num_nodes_alone(labels, offsets[a : b + 1] - offsets[a]))
        _let_go(sequences.labels)
    return np.concatenate(parts)


def _ranges_of_order(
    sequences: Sequences, offsets: Int64[np.ndarray, " B1"], lengths: Int64[np.ndarray, " B"]
) -> Iterator[Int64[np.ndarray, " C"]]:
    """The sequences of each range, ascending; no range is empty."""
    num_ranges = -(-int(lengths.sum()) // TOKENS_AT_ONCE)
    if num_ranges <= 1:
        if len(lengths):
            yield np.arange(len(lengths))
        return
    sampled = np.unique(np.linspace(0, len(lengths) - 1, SAMPLED_PER_RANGE * num_ranges).astype(np.int64))
    ids, starts = _gather_ids(sequences, offsets[sampled], lengths[sampled])
    borders = sorted(sort_keys(ids, starts, lengths[sampled]))[SAMPLED_PER_RANGE::SAMPLED_PER_RANGE]
    range_of = np.empty(len(lengths), np.int32)
    for a, b in _blocks(offsets):
        keys = sort_keys(sequences.input_ids[offsets[a] : offsets[b]], offsets[a:b] - offsets[a], lengths[a:b])
        range_of[a:b] = [bisect_right(borders, key) for key in keys]
        _let_go(sequences.input_ids)
    for number in range(len(borders) + 1):
        members = np.flatnonzero(range_of == number)
        if len(members):
            yield members


def _blocks(offsets: Int64[np.ndarray, " B1"]) -> Iterator[tuple[int, int]]:
    """Neighboring sequences `a .. b - 1` that hold few enough tokens together, or one that holds more."""
    first, end = 0, len(offsets) - 1
    while first < end:
        after = int(np.searchsorted(offsets, offsets[first] + TOKENS_AT_ONCE, side="right")) - 1
        after = max(after, first + 1)
        yield first, after
        first = after


def _gather_ids(
    sequences: Sequences, starts: Int64[np.ndarray, " C"], lengths: Int64[np.ndarray, " C"]
) -> tuple[Int32[np.ndarray, " K"], Int64[np.ndarray, " C"]]:
    """The tokens of some sequences, laid end to end, and where each begins."""
    new_starts = np.cumsum(lengths) - lengths
    at = np.arange(int(lengths.sum())) + np.repeat(starts - new_starts, lengths)
    return np.asarray(sequences.input_ids[at]), new_starts


def _num_equal(a: Int32[np.ndarray, " J"], b: Int32[np.ndarray, " K"]) -> int:
    """Length of the common prefix."""
    shorter = min(len(a), len(b))
    differs = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differs[0]) if len(differs) else shorter


def _let_go(array: np.ndarray) -> None:
    mapped: object = array.base
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
