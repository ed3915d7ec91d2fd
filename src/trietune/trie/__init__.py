"""Token sequences become tries, batches and micro-batches. Pure NumPy: nothing here knows torch or files."""

from trietune.trie.batching import UNBOUNDED, Batching, MicroBatch, Sequences, make_micro_batches, total_weight
from trietune.trie.trie import (
    IGNORED_LABEL,
    Trie,
    build_trie,
    common_prefix_lengths,
    num_nodes_alone,
    pad_trie,
    sort_sequences,
)

__all__ = [
    "Batching",
    "IGNORED_LABEL",
    "MicroBatch",
    "Sequences",
    "Trie",
    "UNBOUNDED",
    "build_trie",
    "common_prefix_lengths",
    "make_micro_batches",
    "num_nodes_alone",
    "pad_trie",
    "sort_sequences",
    "total_weight",
]
