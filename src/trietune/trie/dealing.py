"""Deal the sequences of one optimizer step over processes, by what a trie of each part costs.

    sorted sequences   a b c 1 | a b c 2 | a b c 3 | x y 4 | z 5
    two parts          [------------ 0 ------------|------ 1 ------]      the largest part is as small as it can be

Two ways are tried, and the better one is taken. *Runs*: the sorted sequences are cut into runs of neighbors; cutting in
front of a sequence computes again what it shares with the one before. *Groups*: sequences that share much stay
together, and whole groups go to the process that has least. Many small groups deal evenly whole; a few large ones must
be cut.

Every process computes the same deal from the same indices, so nothing is communicated. A part may be empty.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from trietune.trie.batching import Batching, Sequences, gather
from trietune.trie.groups import SHARED_PART
from trietune.trie.trie import IGNORED_LABEL, common_prefix_lengths, num_nodes_alone, sort_sequences

# The search for the smallest bound ends when it is known to this relative precision.
PRECISION = 1e-9


@dataclass(frozen=True, slots=True)
class Deal:
    """Who computes which sequences of a step.

    Attributes:
        parts: for each process, indices into the data set, int64, in sorted order. Sequences without a label are in
            no part.
        costs: costs of the parts, in nodes.
        cost_of_whole: cost of one trie of everything.
        num_labels: labels of all parts together: the divisor of the step's loss.
    """

    parts: tuple[Int64[np.ndarray, " _"], ...]
    costs: Float64[np.ndarray, " R"]
    cost_of_whole: float
    num_labels: int

    @property
    def imbalance(self) -> float:
        """The largest part over the mean part; 1 is even."""
        return float(self.costs.max() / max(self.costs.mean(), 1e-9))

    @property
    def repeated(self) -> float:
        """What is computed more than once because the step is split, as a share of the whole."""
        return float(self.costs.sum() / max(self.cost_of_whole, 1e-9)) - 1

    @property
    def speed_up(self) -> float:
        """How many times faster than one process, if nothing but computing took time."""
        return self.cost_of_whole / max(float(self.costs.max()), 1e-9)


def deal_step(
    sequences: Sequences,
    indices: Int64[np.ndarray, " B"],
    num_parts: int,
    *,
    batching: Batching,
    label_cost: float,
) -> Deal:
    """Deal `sequences[indices]`, all of one optimizer step, into `num_parts` parts.

    Args:
        batching: only a trie shares; packed and padded parts are dealt by their tokens.
        label_cost: cost of one label at the output head, in nodes of the layers before it.
    """
    step = _sort(sequences, np.asarray(indices, np.int64), share=batching == "trie", label_cost=label_cost)
    ways = [cut_into_runs(step, num_parts)]
    if num_parts > 1:
        ways.append(deal_groups(step, num_parts))
    costs = [np.array([step.cost(places) for places in way]) for way in ways]
    best = min(range(len(ways)), key=lambda number: (costs[number].max(), costs[number].sum()))
    return Deal(
        parts=tuple(step.sequence_indices[places] for places in ways[best]),
        costs=costs[best],
        cost_of_whole=step.cost(np.arange(step.num_sequences)),
        num_labels=step.num_labels,
    )


@dataclass(frozen=True, slots=True)
class SortedStep:
    """The sequences of a step in sorted order.

    Attributes:
        sequence_indices: into the data set.
        lengths: nodes of each alone.
        shared: nodes that each shares with the one before; 0 for the first.
        extra: what the labels of each cost, in nodes.
        num_labels: labels of all.
    """

    sequence_indices: Int64[np.ndarray, " B"]
    lengths: Int64[np.ndarray, " B"]
    shared: Int64[np.ndarray, " B"]
    extra: Float64[np.ndarray, " B"]
    num_labels: int

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    def cost(self, places: Int64[np.ndarray, " P"]) -> float:
        """Of one trie of the sequences at `places`, ascending."""
        if len(places) == 0:
            return 0.0
        alone = float(self.lengths[places].sum() + self.extra[places].sum())
        if len(places) == 1:
            return alone
        # Two sequences share what all neighbors between them do.
        least = np.minimum.reduceat(self.shared[: places[-1] + 1], places[:-1] + 1)
        return alone - float(least.sum())


def cut_into_runs(step: SortedStep, num_parts: int) -> list[Int64[np.ndarray, " P"]]:
    """Runs of neighbors, at most `num_parts` of them, whose largest cost is least; empty parts at the end.

    A run costs no less than any run within it, so for a given bound the longest runs that keep it are the fewest, and
    the smallest bound that few enough runs keep is found by halving.
    """
    num = step.num_sequences
    own = np.concatenate(([0.0], np.cumsum(step.lengths - step.shared + step.extra)))
    repeated = np.append(step.shared, 0).astype(np.float64)

    def cut(bound: float) -> list[int] | None:
        """Where the runs end, if `num_parts` runs keep `bound`."""
        ends: list[int] = []
        first = 0
        while first < num:
            reach = own[first] - repeated[first] + bound * (1 + PRECISION)
            end = int(np.searchsorted(own, reach, side="right")) - 1
            if end <= first or len(ends) == num_parts:
                return None
            ends.append(end)
            first = end
        return ends

    def largest(ends: Sequence[int]) -> float:
        starts = [0, *ends][:-1]
        return max(
            (float(own[end] - own[start] + repeated[start]) for start, end in zip(starts, ends, strict=True)),
            default=0.0,
        )

    ends = [num] if num else []
    high, low = largest(ends), float(own[-1]) / num_parts
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        found = cut(middle)
        if found is None:
            low = middle
        else:
            ends, high = found, min(middle, largest(found))
    starts = [0, *ends][:-1]
    runs = [np.arange(start, end) for start, end in zip(starts, ends, strict=True)]
    return runs + [np.zeros(0, np.int64)] * (num_parts - len(runs))


def deal_groups(step: SortedStep, num_parts: int) -> list[Int64[np.ndarray, " P"]]:
    """Whole groups of neighbors that share much, the costliest first, each to the part that has least so far."""
    together = np.zeros(step.num_sequences, bool)
    shorter = np.minimum(step.lengths[1:], step.lengths[:-1])
    together[1:] = step.shared[1:] >= np.maximum(1, SHARED_PART * shorter)
    groups = np.split(np.arange(step.num_sequences), np.flatnonzero(~together)[1:])
    costs = [step.cost(group) for group in groups]
    loads = [(0.0, number) for number in range(num_parts)]
    parts: list[list[np.ndarray]] = [[] for _ in range(num_parts)]
    for at in sorted(range(len(groups)), key=lambda at: -costs[at]):
        load, number = heapq.heappop(loads)
        parts[number].append(groups[at])
        heapq.heappush(loads, (load + costs[at], number))
    return [np.sort(np.concatenate(part)) if part else np.zeros(0, np.int64) for part in parts]


def _sort(sequences: Sequences, indices: Int64[np.ndarray, " B"], *, share: bool, label_cost: float) -> SortedStep:
    batch = gather(sequences, indices)
    lengths = num_nodes_alone(batch.labels, batch.offsets)
    with_labels = np.flatnonzero(lengths > 0)
    order = with_labels[sort_sequences(batch.input_ids, batch.offsets[with_labels], lengths[with_labels])]
    shared = common_prefix_lengths(batch.input_ids, batch.offsets[order], lengths[order])
    # A label on a sequence's first token is predicted by nothing.
    is_label = batch.labels != IGNORED_LABEL
    is_label[batch.offsets[:-1][np.diff(batch.offsets) > 0]] = False
    before = np.concatenate(([0], np.cumsum(is_label)))
    num_labels = (before[batch.offsets[1:]] - before[batch.offsets[:-1]])[order]
    return SortedStep(
        sequence_indices=batch.sequence_indices[order],
        lengths=lengths[order],
        shared=shared if share else np.zeros_like(shared),
        extra=label_cost * num_labels,
        num_labels=int(num_labels.sum()),
    )
