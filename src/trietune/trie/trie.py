"""Turn token sequences into one trie whose nodes, in depth-first order, are the positions of the model's input.

    sequences      5 6 7 1     5 6 9 1      where 7 1 and 9 1 carry labels
    node            0  1  2  3              a sequence's last labeled token predicts nothing, so it is not a node
    input_ids       5  6  7  9
    position_ids    0  1  2  2              depth: rotary positions are those of the plain sequence
    subtree_end     4  4  3  4              one past the last node below; node 3 does not see node 2
    row_start       0        3  4           the first sequence adds nodes 0..2, the second node 3
    row_path        0 1 2    0 1 3          the nodes of each row's sequence, from the root
    label_index     1 1 2 3                 the node whose output predicts the label; node 1 has two
    labels          7 9 1 1

Node `i` attends node `j` exactly when `j <= i < subtree_end[j]`: sorted order keeps the descendants of a prefix in one
block, so a subtree is only an end index, and the nodes that a sequence adds are one contiguous row.

Letters: T nodes, R rows, P nodes of all paths, N (node, label) pairs, M labels before merging, B sequences, K tokens.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64, Int, Int32, Int64

IGNORED_LABEL = -100

# Sequences x depths computed at once when paths are found; bounds memory for very large or very long batches.
MAX_TABLE_CELLS = 4_000_000


@dataclass(frozen=True, slots=True)
class Trie:
    """A batch of sequences with every distinct prefix once.

    Attributes:
        input_ids: token of each node.
        position_ids: depth of each node, 0 at a root.
        subtree_end: one past the last descendant of each node.
        row_start: first node of each row, and T at the end; rows are not empty and cover all nodes.
        row_path: for each row, the nodes from the root to the row's last node, flat.
        row_path_start: where each row's path begins in `row_path`, and P at the end.
        label_index: node whose output predicts the label, ascending.
        labels: token to predict; (label_index, labels) pairs are distinct.
        label_weight: how many labels of the batch were merged into the pair.
        pair_of_label: for every label of every sequence, the pair that it was merged into.
        sequence_of_label: and the sequence, as an index into the order given to `build_trie`.
    """

    input_ids: Int32[np.ndarray, " T"]
    position_ids: Int32[np.ndarray, " T"]
    subtree_end: Int32[np.ndarray, " T"]
    row_start: Int32[np.ndarray, " R1"]
    row_path: Int32[np.ndarray, " P"]
    row_path_start: Int32[np.ndarray, " R1"]
    label_index: Int32[np.ndarray, " N"]
    labels: Int32[np.ndarray, " N"]
    label_weight: Float64[np.ndarray, " N"]
    pair_of_label: Int32[np.ndarray, " M"]
    sequence_of_label: Int32[np.ndarray, " M"]

    @property
    def num_nodes(self) -> int:
        """Distinct tokens: what the model computes."""
        return len(self.input_ids)

    @property
    def num_rows(self) -> int:
        return len(self.row_start) - 1

    def sees(self, query: np.ndarray, key: np.ndarray, window: int | None = None) -> np.ndarray:
        """Whether node `query` attends node `key`: it lies in the subtree of `key`, less than `window` below it.

        Args:
            query, key: nodes, of shapes that broadcast.
        """
        is_seen: np.ndarray = (key <= query) & (query < self.subtree_end[key])
        if window is not None:
            is_seen &= self.position_ids[query] - self.position_ids[key] < window
        return is_seen


def build_trie(
    input_ids: Int32[np.ndarray, " K"],
    labels: Int32[np.ndarray, " K"],
    offsets: Int64[np.ndarray, " B1"],
    *,
    share: bool = True,
) -> Trie:
    """Build the trie of sequences `input_ids[offsets[i] : offsets[i + 1]]`.

    Tokens after a sequence's last label, and that label's own token, predict nothing and are left out; a sequence
    without a label adds nothing. A label on a sequence's first token is predicted by nothing and left out too.

    Args:
        input_ids: tokens of all sequences, flat.
        labels: alike; `IGNORED_LABEL` where there is none.
        offsets: bounds of the sequences.
        share: False makes every sequence a branch of its own (packing), with the same fields.
    """
    starts, lengths = offsets[:-1], num_nodes_alone(labels, offsets)
    order = sort_sequences(input_ids, starts, lengths) if share else np.arange(len(starts))
    starts, lengths = starts[order], lengths[order]
    shared = common_prefix_lengths(input_ids, starts, lengths) if share else np.zeros_like(lengths)
    return _assemble(input_ids, labels, order, starts, lengths, shared)


def pad_trie(trie: Trie, num_nodes: int) -> Trie:
    """The same trie with padding at its end, up to `num_nodes` nodes: one more row, which no other node sees.

    Padding nodes hold token 0, see only each other and predict nothing.
    """
    added = num_nodes - trie.num_nodes
    if added <= 0:
        return trie
    nodes = np.arange(trie.num_nodes, num_nodes, dtype=np.int32)
    return replace(
        trie,
        input_ids=np.append(trie.input_ids, np.zeros(added, np.int32)),
        position_ids=np.append(trie.position_ids, np.arange(added, dtype=np.int32)),
        subtree_end=np.append(trie.subtree_end, np.full(added, num_nodes, np.int32)),
        row_start=np.append(trie.row_start, np.int32(num_nodes)),
        row_path=np.append(trie.row_path, nodes),
        row_path_start=np.append(trie.row_path_start, np.int32(len(trie.row_path) + added)),
    )


def num_nodes_alone(labels: Int32[np.ndarray, " K"], offsets: Int64[np.ndarray, " B1"]) -> Int64[np.ndarray, " B"]:
    """Positions that a plain row of each sequence must compute: up to the one that predicts its last label."""
    labeled = np.flatnonzero(labels != IGNORED_LABEL)
    # The last labeled token before each sequence's end; it counts only if it lies inside the sequence.
    last = np.searchsorted(labeled, offsets[1:]) - 1
    position = labeled[np.maximum(last, 0)] if len(labeled) else np.full(len(last), -1)
    return np.where((last >= 0) & (position > offsets[:-1]), position - offsets[:-1], 0)


def sort_sequences(
    input_ids: Int32[np.ndarray, " K"], starts: Int64[np.ndarray, " B"], lengths: Int64[np.ndarray, " B"]
) -> Int64[np.ndarray, " B"]:
    """Lexicographic order, a prefix before its extensions, equal sequences in the order given."""
    keys = sort_keys(input_ids, starts, lengths)
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def sort_keys(
    input_ids: Int32[np.ndarray, " K"], starts: Int64[np.ndarray, " B"], lengths: Int64[np.ndarray, " B"]
) -> list[bytes]:
    """Bytes that compare as the sequences do: big-endian, so that Python sorts with one memcmp a comparison."""
    text = input_ids.astype(">i4").tobytes()
    return [text[4 * a : 4 * (a + n)] for a, n in zip(starts.tolist(), lengths.tolist(), strict=True)]


def common_prefix_lengths(
    input_ids: Int32[np.ndarray, " K"], starts: Int64[np.ndarray, " B"], lengths: Int64[np.ndarray, " B"]
) -> Int64[np.ndarray, " B"]:
    """Tokens that each sequence shares with the one before it; 0 for the first."""
    shared = np.zeros(len(starts), np.int64)
    if len(starts) < 2:
        return shared
    shortest = np.minimum(lengths[:-1], lengths[1:])
    depth, segment_start = _ranges(shortest)
    differs = input_ids[np.repeat(starts[:-1], shortest) + depth] != input_ids[np.repeat(starts[1:], shortest) + depth]
    first_difference = np.where(differs, depth, np.iinfo(np.int64).max)
    filled = shortest > 0
    if filled.any():
        shared[1:][filled] = np.minimum.reduceat(first_difference, segment_start[filled])
    return np.minimum(shared, np.concatenate(([0], shortest)))


def _assemble(
    input_ids: Int32[np.ndarray, " K"],
    labels: Int32[np.ndarray, " K"],
    order: Int64[np.ndarray, " B"],
    starts: Int64[np.ndarray, " B"],
    lengths: Int64[np.ndarray, " B"],
    shared: Int64[np.ndarray, " B"],
) -> Trie:
    added = lengths - shared
    node_start = np.concatenate(([0], np.cumsum(added)))
    offset_in_row, _ = _ranges(added)
    depth = np.repeat(shared, added) + offset_in_row
    path, path_start = _paths(lengths, shared, node_start)
    label_index, label, sequence = _labels(labels, order, starts, lengths, path, path_start)
    pairs, pair_of_label, weight = np.unique(
        label_index.astype(np.int64) << 32 | label, return_inverse=True, return_counts=True
    )
    is_row = added > 0
    row_path, row_path_start = _select_segments(path, path_start, is_row)
    return Trie(
        input_ids=input_ids[np.repeat(starts, added) + depth],
        position_ids=depth.astype(np.int32),
        subtree_end=_subtree_ends(lengths, shared, node_start),
        row_start=np.append(node_start[:-1][is_row], node_start[-1]).astype(np.int32),
        row_path=row_path,
        row_path_start=row_path_start,
        label_index=(pairs >> 32).astype(np.int32),
        labels=(pairs & 0xFFFFFFFF).astype(np.int32),
        label_weight=weight.astype(np.float64),
        pair_of_label=pair_of_label.astype(np.int32),
        sequence_of_label=sequence.astype(np.int32),
    )


def _paths(
    lengths: Int64[np.ndarray, " B"], shared: Int64[np.ndarray, " B"], node_start: Int64[np.ndarray, " B+1"]
) -> tuple[Int32[np.ndarray, " M"], Int64[np.ndarray, " B+1"]]:
    """The node at each depth of each sequence, flat.

    The node at depth `d` belongs to the last sequence up to this one that does not share depth `d` with the sequence
    before it.
    """
    start = np.concatenate(([0], np.cumsum(lengths)))
    path = np.empty(start[-1], np.int32)
    sequence = np.arange(len(lengths))[:, None]
    for depth in _depth_blocks(lengths):
        owner = np.maximum.accumulate(np.where(shared[:, None] <= depth, sequence, -1), axis=0)
        row, column = np.nonzero(depth < lengths[:, None])
        owner, at = owner[row, column], depth[column]
        path[start[row] + at] = node_start[owner] + at - shared[owner]
    return path, start


def _subtree_ends(
    lengths: Int64[np.ndarray, " B"],
    shared: Int64[np.ndarray, " B"],
    node_start: Int64[np.ndarray, " B+1"],
) -> Int32[np.ndarray, " T"]:
    """A node at depth `d` ends where the next sequence begins that does not share depth `d`."""
    num_nodes = node_start[-1]
    ends = np.empty(num_nodes, np.int32)
    for depth in _depth_blocks(lengths):
        begins = np.where(shared[1:, None] <= depth, node_start[1:-1, None], num_nodes)
        begins = np.concatenate((begins, np.full((1, len(depth)), num_nodes)))
        end = np.minimum.accumulate(begins[::-1], axis=0)[::-1]
        row, column = np.nonzero((depth >= shared[:, None]) & (depth < lengths[:, None]))
        ends[node_start[row] + depth[column] - shared[row]] = end[row, column]
    return ends


def _depth_blocks(lengths: Int64[np.ndarray, " B"]) -> list[np.ndarray]:
    longest = int(lengths.max(initial=0))
    size = max(1, MAX_TABLE_CELLS // max(1, len(lengths)))
    return [np.arange(a, min(a + size, longest)) for a in range(0, longest, size)]


def _labels(
    labels: Int32[np.ndarray, " K"],
    order: Int64[np.ndarray, " B"],
    starts: Int64[np.ndarray, " B"],
    lengths: Int64[np.ndarray, " B"],
    path: Int32[np.ndarray, " M"],
    path_start: Int64[np.ndarray, " B+1"],
) -> tuple[Int32[np.ndarray, " L"], Int32[np.ndarray, " L"], Int64[np.ndarray, " L"]]:
    """Predicting node, label and sequence of every label."""
    depth, _ = _ranges(lengths)  # of the predicting node; the label sits one deeper
    label = labels[np.repeat(starts, lengths) + depth + 1]
    at = np.flatnonzero(label != IGNORED_LABEL)
    sequence = np.repeat(order, lengths)[at]
    return path[at], label[at], sequence


def _select_segments(
    values: Int32[np.ndarray, " A"], start: Int64[np.ndarray, " B1"], chosen: np.ndarray
) -> tuple[Int32[np.ndarray, " P"], Int32[np.ndarray, " R1"]]:
    lengths = np.diff(start)
    kept = lengths[chosen]
    return values[np.repeat(chosen, lengths)], np.concatenate(([0], np.cumsum(kept))).astype(np.int32)


def _ranges(lengths: Int[np.ndarray, " B"]) -> tuple[Int64[np.ndarray, " A"], Int64[np.ndarray, " B"]]:
    """`0 .. length - 1` for each length, one after the other, and where each begins."""
    start = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(start, lengths), start
