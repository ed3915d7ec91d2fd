"""Segments of a trie: every plan computes what plain rows compute, and the cuts are the cheapest there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import batches, flat
from trietune.trie import Trie, build_trie, pad_trie
from trietune.trie.segments import (
    ScanCost,
    Segments,
    branch_points,
    cheapest_cuts,
    choose_segments,
    context_of,
    make_segments,
)

COSTS = [ScanCost(0, 0), ScanCost(3, 0, multiple=4), ScanCost(10, 5, multiple=16)]


def trie_of(batch: tuple[list[list[int]], list[list[int]]], num_padded: int = 0) -> Trie:
    sequences = flat(*batch)
    trie = build_trie(sequences.input_ids, sequences.input_ids, sequences.offsets)
    return pad_trie(trie, trie.num_nodes + num_padded)


def paths_of(trie: Trie) -> list[list[int]]:
    """The nodes from the root to each node, by what a trie says of subtrees alone."""
    return [[j for j in range(i + 1) if i < trie.subtree_end[j]] for i in range(trie.num_nodes)]


def scanned(trie: Trie, segments: Segments) -> list[list[int]]:
    """For each node, the nodes that its scan has gone through, which is the state of this scan."""
    found: list[list[int]] = []
    states: list[list[int]] = []
    for level in segments.levels:
        handed_on = []
        for bucket in level:
            outputs: list[list[int]] = []
            for row, nodes in enumerate(bucket.nodes.tolist()):
                state = [] if bucket.parent is None else list(states[bucket.parent[row]])
                for node in nodes:
                    state = state if node == trie.num_nodes else [*state, node]
                    outputs.append(state)
                if row < bucket.num_states:
                    assert state[-1] == bucket.ends[row]
                    handed_on.append(state)
            found += [outputs[place] for place in bucket.kept.tolist()]
        states = handed_on
    return [found[place] for place in segments.order.tolist()]


@given(batches(), st.data())
@settings(max_examples=40, deadline=None)
def test_segments_between_any_cuts_go_through_the_path_of_every_node(batch, data) -> None:
    trie = trie_of(batch, data.draw(st.sampled_from([0, 3])))
    if not trie.num_nodes:
        return
    cuts = data.draw(st.sets(st.integers(0, trie.num_nodes - 1)))
    cost = data.draw(st.sampled_from(COSTS))
    for segments in (
        make_segments(trie, cuts, cost, likeness=data.draw(st.sampled_from([0.0, 0.6]))),
        choose_segments(trie, cost),
    ):
        assert scanned(trie, segments) == paths_of(trie)
        buckets = [bucket for level in segments.levels for bucket in level]
        assert segments.num_calls == len(buckets)
        assert segments.num_steps == sum(len(b.nodes) * cost.steps(b.nodes.shape[1]) for b in buckets)


@given(batches(), st.integers(1, 5), st.sampled_from([0, 2]))
@settings(max_examples=40, deadline=None)
def test_a_window_sees_the_last_nodes_of_its_path_and_zeros_before_the_root(batch, width, num_padded) -> None:
    trie = trie_of(batch, num_padded)
    context = context_of(trie, width)
    assert len(context.packed) == trie.num_nodes + trie.num_rows * (width - 1)
    for node, path in enumerate(paths_of(trie)):
        at = int(context.own[node])
        seen = context.packed[at - width + 1 : at + 1].tolist()
        assert seen == ([trie.num_nodes] * width + path)[-width:]


def test_no_cut_is_a_rescan_and_every_branch_point_scans_no_node_twice() -> None:
    trie = trie_of(([[0, 1, 2, 3, 9], [0, 1, 2, 4, 9], [0, 5, 9]],) * 2)
    assert branch_points(trie) == [0, 2]
    one = ScanCost(0, 0)
    rescan, fork = make_segments(trie, [], one), make_segments(trie, [0, 2], one, likeness=1.0)
    assert (rescan.num_steps, len(rescan.levels), rescan.num_starts) == (12, 1, 0)  # three calls' worth, padded to 4
    assert (fork.num_steps, len(fork.levels), fork.num_starts) == (trie.num_nodes, 3, 4)


def cost_of(trie: Trie, cuts: tuple[int, ...], cost: ScanCost) -> tuple[int, int]:
    """Steps and starts without padding to the longest of a call, and levels: equal lengths alone share a call."""
    segments = make_segments(trie, cuts, cost, likeness=1.0)
    return segments.num_steps + cost.start * segments.num_starts, len(segments.levels)


def test_the_cuts_are_the_cheapest_of_all_sets_of_branch_points() -> None:
    draw = np.random.default_rng(0)
    num_checked = num_cut = 0
    for _ in range(15):
        rows = [draw.integers(0, 2, draw.integers(2, 12)).tolist() for _ in range(draw.integers(1, 8))]
        trie = trie_of((rows, rows))
        points = branch_points(trie)
        if not trie.num_nodes or len(points) > 6:
            continue
        for cost in (ScanCost(0, 0), ScanCost(3, 0), ScanCost(0, 0, 4), ScanCost(3, 0, 4)):
            sets = itertools.chain.from_iterable(itertools.combinations(points, n) for n in range(len(points) + 1))
            every = [cost_of(trie, cuts, cost) for cuts in sets]
            for levels, cuts in enumerate(cheapest_cuts(trie, cost, most_levels=3), start=1):
                found, num_levels = cost_of(trie, tuple(cuts), cost)
                assert num_levels <= levels
                assert found == min(other for other, used in every if used <= levels)
                num_checked += 1
                num_cut += bool(cuts)
    assert num_checked > 60
    assert num_cut > 15, "some of these are cheaper with cuts"


@pytest.mark.parametrize(("start", "is_cut"), [(0, True), (10**6, False)])
def test_a_start_that_costs_much_keeps_from_cutting(start: int, is_cut: bool) -> None:
    stem = list(range(40))
    rows = [[*stem, 50 + n, 60 + n] for n in range(5)]
    trie = trie_of((rows, rows))
    assert (choose_segments(trie, ScanCost(start, 5)).num_starts > 0) == is_cut


def test_rows_that_nest_deeply_are_cut_without_deep_recursion() -> None:
    """A conversation after each of its turns: every row runs on where the one before it ended."""
    tokens = list(range(900))
    rows = [[*tokens[:length], 2000 + length, 3000] for length in range(1, 900, 3)]
    trie = trie_of((rows, rows))
    cost = ScanCost(10, 5, multiple=16)
    assert choose_segments(trie, cost).num_steps < make_segments(trie, [], cost).num_steps / 5
