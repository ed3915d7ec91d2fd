"""Cut the paths of a trie into segments, for layers that carry a state from token to token.

A *cut* is a node whose state is kept. Segments run between cuts, level by level, each from the state at the cut above
it. Without a cut every path is scanned from its root; with one at every branch point no node is scanned twice:

    0 1 2 3 4          no cut        one level    0 1 2 3 4 | 0 1 2 5 6
        \\ 5 6          node 2 cut    two levels   0 1 2, then 3 4 | 5 6, both from the state after 2

Calls and states that are started from cost time, so the best cuts lie between the two. `choose_segments` finds them.

Letters: T nodes, R rows, S segments of a bucket, L steps of its longest, K kept outputs.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int64

from trietune.trie.trie import Trie

# Beyond this many levels the best cuts no longer get cheaper: what is deeper is short.
MOST_LEVELS = 6
# A bucket takes segments at least this fraction as long as its longest; 0 puts a level into one call.
LIKENESSES = (0.0, 0.5, 0.75)


@dataclass(frozen=True, slots=True)
class ScanCost:
    """What a scan costs, in the time of one step.

    Attributes:
        start: a segment that starts from a state, which is copied, read and kept for the backward pass.
        call: one call of the scan, forward and backward.
        multiple: a segment takes as many steps as if it were this long, or a multiple of it: chunks of the scan.
    """

    start: int
    call: int
    multiple: int = 1

    def steps(self, length: int) -> int:
        return -(-length // self.multiple) * self.multiple

    def of(self, segments: "Segments") -> int:
        return segments.num_steps + self.start * segments.num_starts + self.call * segments.num_calls


@dataclass(frozen=True, slots=True)
class SegmentBucket:
    """Segments of one level and of like lengths, which run in one call.

    Attributes:
        nodes: of each segment, then T, the step that changes nothing.
        parent: of each segment, which of the states handed on by the level above it starts from; None at level 0.
        kept: places in the flattened [S * L] outputs whose nodes no earlier segment computes.
        num_states: the first so many segments end in a cut; their states are handed on.
        ends: last node of each segment.
    """

    nodes: Int64[np.ndarray, "S L"]
    parent: Int64[np.ndarray, " S"] | None
    kept: Int64[np.ndarray, " K"]
    num_states: int
    ends: Int64[np.ndarray, " S"]


@dataclass(frozen=True, slots=True)
class Segments:
    """All segments of a trie.

    Attributes:
        levels: buckets of each level. States are handed from a level to the next in the order of the buckets.
        order: puts the kept outputs, bucket after bucket, into the order of nodes: [T].
        num_steps: that are scanned, padding and repeated nodes included.
        num_starts: segments that start from a state.
        num_calls: buckets.
    """

    levels: tuple[tuple[SegmentBucket, ...], ...]
    order: Int64[np.ndarray, " T"]
    num_steps: int
    num_starts: int
    num_calls: int


@dataclass(frozen=True, slots=True)
class Context:
    """Rows behind the nodes that a causal window of some width sees before them.

    Attributes:
        packed: each row's last `width - 1` nodes above it on its path, then its own; T where the path has none.
        own: where each node lies in `packed`: [T].
    """

    packed: Int64[np.ndarray, " P"]
    own: Int64[np.ndarray, " T"]


def choose_segments(trie: Trie, cost: ScanCost, *, most_levels: int = MOST_LEVELS) -> Segments:
    """The cheapest segments of one to `most_levels` levels, each in one call a level or in calls of like lengths."""
    best: Segments | None = None
    for levels, cuts in enumerate(cheapest_cuts(trie, cost, most_levels=most_levels), start=1):
        if levels > 1 and not cuts:
            break
        for likeness in LIKENESSES:
            segments = make_segments(trie, cuts, cost, likeness=likeness)
            if best is None or cost.of(segments) < cost.of(best):
                best = segments
    assert best is not None
    return best


def make_segments(trie: Trie, cuts: Collection[int], cost: ScanCost, *, likeness: float = 0.0) -> Segments:
    """The segments between `cuts`, any nodes; `likeness` as in `LIKENESSES`."""
    is_cut = np.zeros(trie.num_nodes, bool)
    is_cut[list(cuts)] = True
    is_done = np.zeros(trie.num_nodes, bool)
    levels: list[tuple[SegmentBucket, ...]] = []
    kept_nodes: list[np.ndarray] = []
    row_of_cut: dict[int, int] = {}
    num_steps = num_starts = 0
    for number, here in enumerate(_levels_of(trie, is_cut)):
        buckets, rows_here = [], dict[int, int]()
        for group in _of_like_lengths(here, cost, likeness):
            group.sort(key=lambda path: not is_cut[path.nodes[-1]])
            ends = np.array([path.nodes[-1] for path in group], np.int64)
            length = max(len(path.nodes) for path in group)
            nodes = np.full((len(group), length), trie.num_nodes, np.int64)
            kept = []
            for row, path in enumerate(group):
                nodes[row, : len(path.nodes)] = path.nodes
                new = np.flatnonzero(~is_done[path.nodes])
                is_done[path.nodes[new]] = True
                kept.append(row * length + new)
                kept_nodes.append(path.nodes[new])
            num_states = int(is_cut[ends].sum())
            rows_here |= {int(end): len(rows_here) + row for row, end in enumerate(ends[:num_states])}
            parent = None if number == 0 else np.array([row_of_cut[path.above] for path in group], np.int64)
            buckets.append(SegmentBucket(nodes, parent, np.concatenate(kept).astype(np.int64), num_states, ends))
            num_steps += len(group) * cost.steps(length)
            num_starts += len(group) if number else 0
        row_of_cut = rows_here
        levels.append(tuple(buckets))
    order = np.argsort(np.concatenate(kept_nodes)) if kept_nodes else np.zeros(0, np.int64)
    return Segments(tuple(levels), order, num_steps, num_starts, sum(len(level) for level in levels))


def branch_points(trie: Trie) -> list[int]:
    """Nodes below which a row leaves the path of an earlier one, or continues where that one ended; ascending."""
    own = np.diff(trie.row_start)
    last_above = trie.row_path_start[1:] - own - 1
    has_one = last_above >= trie.row_path_start[:-1]
    return [int(node) for node in np.unique(trie.row_path[last_above[has_one]])]


def context_of(trie: Trie, width: int) -> Context:
    """What a causal window of `width` positions needs: no state and no path, only T + R * (width - 1) positions."""
    own_lengths, back = np.diff(trie.row_start), width - 1
    row = np.repeat(np.arange(trie.num_rows), own_lengths)
    own = (np.arange(trie.num_nodes) + (row + 1) * back).astype(np.int64)
    # Of each row the places in `row_path` just above what it adds, deepest last.
    above = (trie.row_path_start[1:] - own_lengths)[:, None] - np.arange(back, 0, -1)
    is_on_path = above >= trie.row_path_start[:-1, None]
    before = np.where(is_on_path, trie.row_path[np.maximum(above, 0)], trie.num_nodes)
    packed = np.empty(trie.num_nodes + trie.num_rows * back, np.int64)
    is_own = np.zeros(len(packed), bool)
    is_own[own] = True
    packed[own], packed[~is_own] = np.arange(trie.num_nodes), before.reshape(-1)
    return Context(packed, own)


def cheapest_cuts(trie: Trie, cost: ScanCost, *, most_levels: int) -> list[list[int]]:
    """For 1, 2 ... `most_levels` levels, the branch points to cut at so that steps and starts cost least.

    Padding to the longest segment of a call, and the calls, are not counted. Branch points and ends of paths form a
    small tree. From its leaves up, each place knows what everything below it costs, for each place above it that the
    last cut may be and each number of levels left: either it is cut, which takes one level, or it is not.
    """
    tree = _Tree(trie)
    parts: dict[int, np.ndarray] = {}  # [levels left - 1, place of the last cut among those above, 0 for none]
    is_better_cut: dict[int, np.ndarray] = {}
    for place in reversed(tree.places):  # depth-first order reversed: what is below comes first
        above = np.array([0, *(tree.depth[n] for n in tree.above[place])])
        length = tree.depth[place] - above
        alone = -(-length // cost.multiple) * cost.multiple + cost.start * (above > 0)
        if not (below := tree.below[place]):
            parts[place] = np.tile(alone, (most_levels, 1))
            continue
        total = sum(parts.pop(n) for n in below)
        assert isinstance(total, np.ndarray)
        uncut, cut = total[:, :-1], np.full((most_levels, len(above)), np.iinfo(np.int64).max)
        cut[1:] = alone + total[:-1, -1:]
        is_better_cut[place] = cut < uncut
        parts[place] = np.minimum(cut, uncut)
    return [tree.follow(is_better_cut, levels) for levels in range(1, most_levels + 1)]


class _Tree:
    """Branch points and ends of paths, in depth-first order; `above` and `below` of each."""

    def __init__(self, trie: Trie) -> None:
        ends = [int(path[-1]) for path in _leaf_paths(trie)]
        self.places: list[int] = sorted({*branch_points(trie), *ends})
        self.depth = {n: int(trie.position_ids[n]) + 1 for n in self.places}
        self.below: dict[int, list[int]] = {n: [] for n in self.places}
        self.above: dict[int, list[int]] = {}
        open_places: list[int] = []
        for n in self.places:
            while open_places and trie.subtree_end[open_places[-1]] <= n:
                open_places.pop()
            if open_places:
                self.below[open_places[-1]].append(n)
            self.above[n] = list(open_places)
            open_places.append(n)

    def follow(self, is_better_cut: dict[int, np.ndarray], levels: int) -> list[int]:
        """The cuts that the tables choose, from the roots down."""
        cuts = []
        state = {n: (levels - 1, 0) for n in self.places if not self.above[n]}
        for n in self.places:
            left, last = state.pop(n)
            if n in is_better_cut and is_better_cut[n][left, last]:
                cuts.append(n)
                left, last = left - 1, len(self.above[n]) + 1
            state.update((below, (left, last)) for below in self.below[n])
        return cuts


@dataclass(frozen=True, slots=True)
class _Segment:
    """Its nodes, and the cut above it; -1 at level 0."""

    nodes: np.ndarray
    above: int


def _leaf_paths(trie: Trie) -> Iterable[np.ndarray]:
    """Paths that no longer path runs over: together they hold every node."""
    for begin, end in zip(trie.row_path_start[:-1].tolist(), trie.row_path_start[1:].tolist(), strict=True):
        last = int(trie.row_path[end - 1])
        if trie.subtree_end[last] == last + 1:
            yield trie.row_path[begin:end]


def _levels_of(trie: Trie, is_cut: Bool[np.ndarray, " T"]) -> list[list[_Segment]]:
    """The distinct segments of each level, in the order of their rows, so that what is shared belongs to the first."""
    levels: list[list[_Segment]] = []
    known: set[tuple[int, int]] = set()
    for path in _leaf_paths(trie):
        bounds = [0, *(np.flatnonzero(is_cut[path]) + 1).tolist()]
        if bounds[-1] < len(path):
            bounds.append(len(path))
        for level, (begin, end) in enumerate(pairwise(bounds)):
            key = (int(path[end - 1]), begin)
            if key in known:
                continue
            known.add(key)
            if level == len(levels):
                levels.append([])
            levels[level].append(_Segment(path[begin:end], int(path[begin - 1]) if begin else -1))
    return levels


def _of_like_lengths(segments: list[_Segment], cost: ScanCost, likeness: float) -> list[list[_Segment]]:
    groups: list[list[_Segment]] = []
    longest = 0
    for segment in sorted(segments, key=lambda one: -len(one.nodes)):
        length = cost.steps(len(segment.nodes))
        if not groups or length < likeness * longest:
            groups.append([])
            longest = length
        groups[-1].append(segment)
    return groups
