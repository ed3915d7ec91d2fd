"""Each part of a layer with a state on a trie, left out: values or gradients are wrong, and the proof notices.

The table "What breaks" of the design, a test a line. `error` is that of loss and gradients in fp64, `proof` what the
self-check says of the same fault in fp32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from states.state_families import VOCAB_SIZE, build
from states.test_states_parity import FP64_TOLERANCE, batch_of, error_of, on_batches, on_rows, precision
from trietune.model.causal_lm import TrieModel
from trietune.model.proof import Proof, prove, random_forests
from trietune.model.states import hand_on, kinds
from trietune.model.states import scan as scans
from trietune.trie.segments import Context, branch_points, context_of, make_segments

Patch = pytest.MonkeyPatch
DELTA, MAMBA2 = "qwen3_5_text", "bamba"
SMALL = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    DELTA: {"layer_types": ["linear_attention", "full_attention"]},
}


def forks(patch: Patch) -> None:
    """Every branch point is a cut, and a level is one call, padded to its longest segment."""
    patch.setattr(scans, "choose_segments", lambda trie, cost: make_segments(trie, branch_points(trie), cost))


def without_kind(kind: Any) -> Callable[[Patch], None]:
    """The functions of a kind see nodes in depth-first order, as if they were one sequence."""

    def apply(patch: Patch) -> None:
        patch.setattr(kinds, "_KINDS", tuple(known for known in kinds._KINDS if known[2] is not kind))

    return apply


def with_context(change: Callable[[Any, Context, int], np.ndarray]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        def changed(trie: Any, width: int) -> Context:
            right = context_of(trie, width)
            return dataclasses.replace(right, packed=change(trie, right, width))

        patch.setattr(scans, "context_of", changed)

    return apply


def no_context(trie: Any, context: Context, width: int) -> np.ndarray:
    is_own = np.zeros(len(context.packed), bool)
    is_own[context.own] = True
    return np.where(is_own, context.packed, trie.num_nodes)


def nodes_in_memory(trie: Any, context: Context, width: int) -> np.ndarray:
    packed = context.packed.copy()
    for start in trie.row_start[:-1]:
        before = np.arange(start - width + 1, start)
        packed[context.own[start] - width + 1 : context.own[start]] = np.where(before < 0, trie.num_nodes, before)
    return packed


def one_step_missing(trie: Any, context: Context, width: int) -> np.ndarray:
    packed = context.packed.copy()
    packed[context.own[trie.row_start[:-1]] - width + 1] = trie.num_nodes
    return packed


def with_start(change: Callable[[torch.Tensor | None], torch.Tensor | None]) -> Callable[[Patch], None]:
    """What is handed on to a segment is changed."""
    right = scans.TrieStates.scan

    def apply(patch: Patch) -> None:
        def scan(self: Any, place: Any, inputs: Any, run: Any) -> Any:
            return right(self, place, inputs, lambda at, start, wants: run(at, change(start), wants))

        patch.setattr(scans.TrieStates, "scan", scan)

    return apply


def last_node_as_padding(patch: Patch) -> None:
    """Harmless to outputs, not to the state that is handed on."""
    right = scans.TrieStates._choose

    def choose(self: Any) -> Any:
        segments, num_nodes = right(self), self._trie.num_nodes
        levels = []
        for level in segments.levels:
            buckets = []
            for bucket in level:
                nodes = bucket.nodes.copy()
                for row in nodes:
                    row[row == num_nodes] = row[row < num_nodes][-1]
                buckets.append(dataclasses.replace(bucket, nodes=nodes))
            levels.append(tuple(buckets))
        return dataclasses.replace(segments, levels=tuple(levels))

    patch.setattr(scans.TrieStates, "_choose", choose)


def dt_padded_before_its_softplus(patch: Patch) -> None:
    """A step past the end of a segment has dt = softplus(bias) instead of 0."""

    def mamba2(library: Any, carrier: Any, place: Any) -> Any:
        def chunk_scan(hidden_states: Any, dt: Any, A: Any, B: Any, C: Any, chunk_size: int, **told: Any) -> Any:
            kept = {name: told[name] for name in ("D", "dt_bias", "dt_softplus", "dt_limit") if name in told}

            def run(inputs: Any, start: Any, wants: bool) -> Any:
                x, time, b, c = inputs
                out = library(
                    x, time, A, b, c, chunk_size, initial_states=start, return_final_states=wants, **kept
                )  # fmt: skip
                return out if wants else (out, None)

            return carrier.scan(place, [hidden_states, dt, B, C], run)

        return chunk_scan

    known = tuple((*k[:2], mamba2) if k[2] is kinds._mamba2 else k for k in kinds._KINDS)
    patch.setattr(kinds, "_KINDS", known)


BREAKS: dict[str, tuple[str, Callable[[Patch], None]]] = {
    "the scan runs over nodes as one sequence": (DELTA, without_kind(kinds._delta_rule)),
    "Mamba 2's scan runs over nodes as one sequence": (MAMBA2, without_kind(kinds._mamba2)),
    "the window runs over nodes as one sequence": ("lfm2", without_kind(kinds._window)),
    "rows have zeros in front of them": ("lfm2", with_context(no_context)),
    "rows have the nodes before them in memory in front of them": ("lfm2", with_context(nodes_in_memory)),
    "one step of the window is missing": ("lfm2", with_context(one_step_missing)),
    "segments start from zero": (DELTA, with_start(lambda start: None)),
    "padding is no neutral step": (DELTA, last_node_as_padding),
    "Mamba 2's padding is no neutral step": (MAMBA2, last_node_as_padding),
    "dt is padded before its softplus": (MAMBA2, dt_padded_before_its_softplus),
    "no gradient flows through the state": (DELTA, with_start(lambda s: None if s is None else s.detach())),
    "no gradient flows through Mamba 2's state": (MAMBA2, with_start(lambda s: None if s is None else s.detach())),
    "no gradient flows through Mamba 1's state": ("jamba", with_start(lambda s: None if s is None else s.detach())),
    "the state is rounded to bf16": (DELTA, with_start(lambda s: None if s is None else s.bfloat16().to(s.dtype))),
}


def small(family: str) -> Any:
    """A layer with a state and an attention."""
    return build(family, num_hidden_layers=2, **SMALL.get(family, {}))


@cache
def rows_of(family: str) -> tuple[float, dict[str, torch.Tensor]]:
    network = small(family).double()
    with precision(torch.float64):
        return on_rows(network, batch_of())


def errors(family: str) -> tuple[float, float]:
    """Of loss, and of gradients."""
    theirs, network = rows_of(family), small(family).double()
    with precision(torch.float64):
        ours = on_batches(network, batch_of())
    return abs(ours[0] - theirs[0]) / theirs[0], error_of(ours, theirs)


def proof_of(family: str) -> Proof:
    model = TrieModel(small(family), device=torch.device("cpu"))
    short, longest = random_forests(VOCAB_SIZE, 40, device=torch.device("cpu"))
    return prove(model, short, longest, family=family)


@pytest.mark.parametrize("fault", BREAKS)
def test_what_is_left_out_is_wrong_and_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, apply = BREAKS[fault]
    forks(monkeypatch)
    apply(monkeypatch)
    of_loss, of_both = errors(family)
    assert of_both > 1e4 * FP64_TOLERANCE, "the fault has happened"
    if "no gradient" in fault:
        assert of_loss < FP64_TOLERANCE, "the loss alone does not show it"
    proof = proof_of(family)
    assert proof.on_whole_rows, "nodes are not trusted: each row runs from its root, in transformers' own code"
    assert any("layer 0" in line for line in proof.lines)


@pytest.mark.parametrize("family", ["lfm2", DELTA, MAMBA2, "jamba"])
def test_with_nothing_left_out_it_is_right_and_proven(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forks(monkeypatch)
    assert max(errors(family)) < FP64_TOLERANCE
    proof = proof_of(family)
    assert set(proof.rungs.values()) == {0}
    assert not proof.on_whole_rows
    assert ("where a state is carried" in proof.lines[0]) == (family != "lfm2")


@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "chunk_for", lambda length, default: chunk)
    for family in (DELTA, MAMBA2):
        assert max(errors(family)) < FP64_TOLERANCE


def test_shortcuts_of_kernels_are_not_taken_on_a_trie(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel for convolution, scan, norm and output at once would see nodes as one sequence."""
    from transformers.models.bamba import modeling_bamba

    def kernel(zxbcdt: Any, conv1d_weight: Any, conv1d_bias: Any, dt_bias: Any, A: Any, D: Any, **_: Any) -> Any:
        raise AssertionError("taken")

    network = small(MAMBA2).train()
    monkeypatch.setattr(modeling_bamba, "mamba2_split_conv1d_scan_combined", kernel)
    with pytest.raises(AssertionError, match="taken"):
        network(torch.arange(3, 9)[None], use_cache=False)
    on_batches(network, batch_of())


def test_a_family_whose_functions_are_unknown_runs_on_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_on, "kind_of", lambda function: None)
    assert proof_of("lfm2").on_whole_rows
