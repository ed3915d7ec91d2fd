"""Layers with a state on a trie: losses and gradients are those of one plain row an example through transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parity.test_gradients import gradients, relative_error, run_backward
from states.state_families import FAMILIES, VOCAB_SIZE, build, in_double
from strategies import FlatSequences, question_batch
from trietune.model.attention.layout import TrieLayout
from trietune.model.causal_lm import TrieModel
from trietune.model.states.scan import TrieStates
from trietune.trie import make_micro_batches
from trietune.trie.segments import ScanCost, branch_points

# As in tests/parity: sums in another order.
FP64_TOLERANCE, FP32_TOLERANCE = 1e-10, 1e-5
# The delta rule solves a triangular system in each chunk, whose rounding is larger; with weights as large as these,
# plain rows in fp32 are up to 1e-4 from plain rows in fp64.
FP32_TOLERANCE_OF_DELTA_RULES = 5e-5

KINDS = ["lfm2", "qwen3_5_text", "granitemoehybrid", "jamba"]  # one of each kind of state
# `kimi_linear`'s attention has values of another size than keys.
ON_A_TRIE = [family for family in FAMILIES if family != "kimi_linear"]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def batch_of(scale: int = 1) -> FlatSequences:
    return question_batch(
        np.random.default_rng(3), vocabulary=VOCAB_SIZE, paragraphs=2, questions=3, scale=scale
    )  # a row that is a prefix, one twice, one of one token


def on_rows(network: Any, batch: FlatSequences) -> tuple[float, dict[str, Tensor]]:
    network.zero_grad()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for begin, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
        labels = torch.from_numpy(batch.labels[begin + 1 : end]).long()
        if not bool((labels != -100).any()):
            continue
        logits = network(input_ids=torch.from_numpy(batch.input_ids[begin:end]).long()[None], use_cache=False).logits
        total = total + torch.nn.functional.cross_entropy(logits[0, :-1], labels, reduction="sum")
        count += int((labels != -100).sum())
    (total / count).backward()
    return total.item() / count, gradients(network)


def on_batches(
    network: Any, batch: FlatSequences, *, batching: Any = "trie", way: Any = "rows", max_positions: int = 10**6
) -> tuple[float, dict[str, Tensor]]:
    network.zero_grad()
    model = TrieModel(network, device=torch.device("cpu"), attention=way)
    micro_batches = make_micro_batches(batch, np.arange(len(batch)), batching=batching, max_positions=max_positions)
    return run_backward(model, micro_batches), gradients(network)


def error_of(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]]) -> float:
    """Of the loss, and of all gradients together, relative."""
    return max(relative_error(ours[1], theirs[1]), abs(ours[0] - theirs[0]) / abs(theirs[0]))


@contextlib.contextmanager
def precision(dtype: torch.dtype) -> Any:
    with in_double() if dtype == torch.float64 else contextlib.nullcontext():
        yield


def tolerance(family: str, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return FP64_TOLERANCE
    is_delta = family.startswith(("qwen", "olmo"))
    return FP32_TOLERANCE_OF_DELTA_RULES if is_delta else FP32_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", KINDS)
def test_a_trie_has_the_gradients_of_one_row_an_example(family: str, dtype: torch.dtype) -> None:
    network, batch = build(family).to(dtype), batch_of()
    with precision(dtype):
        assert error_of(on_batches(network, batch), on_rows(network, batch)) < tolerance(family, dtype)


CUTS: dict[str, Callable[[Any], list[int]]] = {
    "rescan": lambda trie: [],
    "fork": branch_points,
    "every third node": lambda trie: list(range(0, trie.num_nodes, 3)),
}


@pytest.mark.parametrize("family", ["qwen3_5_text", "granitemoehybrid", "jamba"])
def test_every_set_of_cuts_has_these_gradients(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, batch = build(family).double(), batch_of()
    with precision(torch.float64):
        rows = on_rows(network, batch)
        for name, cuts in CUTS.items():
            monkeypatch.setattr(
                TrieLayout, "carrier",
                property(lambda self, cuts=cuts: self._states or _cut(self, cuts)),
            )  # fmt: skip
            assert error_of(on_batches(network, batch), rows) < FP64_TOLERANCE, name


def _cut(self: TrieLayout, cuts: Callable[[Any], list[int]]) -> TrieStates:
    self._states = TrieStates(self._trie, device=self._device, to_device=self._to_device, cuts=cuts(self._trie))
    return self._states


@pytest.mark.parametrize("family", ["lfm2", "jamba"])
def test_cut_batches_packed_ones_and_recomputed_layers_have_these_gradients(family: str) -> None:
    """Jamba's layers hand nothing on to what carries their state, so a second computation must find it by itself."""
    network, batch = build(family).double(), batch_of()
    with precision(torch.float64):
        rows = on_rows(network, batch)
        assert error_of(on_batches(network, batch, max_positions=40), rows) < FP64_TOLERANCE
        assert error_of(on_batches(network, batch, batching="packed", way="mask"), rows) < FP64_TOLERANCE
        network.train()
        network.gradient_checkpointing_enable({"use_reentrant": False})
        assert error_of(on_batches(network, batch), rows) < FP64_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("family", ON_A_TRIE)
def test_every_family_has_these_gradients_in_every_way(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(scale=3)
    for dtype in (torch.float64, torch.float32):
        network, *networks = (build(family).to(dtype) for _ in range(6))
        with precision(dtype):
            rows = on_rows(network, batch)
            for batching, way in (("trie", "rows"), ("trie", "mask"), ("packed", "rows"), ("padded", None)):
                other = networks.pop()
                error = error_of(on_batches(other, batch, batching=batching, way=way), rows)
                assert error < (tolerance(family, dtype) if dtype == torch.float64 else 3e-4), (batching, way)
            network.train()
            network.gradient_checkpointing_enable({"use_reentrant": False})
            assert error_of(on_batches(network, batch, max_positions=150), rows) < 3e-4
            network = networks.pop()
            for cost in (ScanCost(0, 0), ScanCost(10**6, 0)):
                monkeypatch.setattr("trietune.model.states.scan.CPU_COST", cost)
                assert error_of(on_batches(network, batch), rows) < 3e-4


def test_without_a_trie_the_layers_are_those_of_transformers() -> None:
    network, plain = build("lfm2"), build("lfm2")
    TrieModel(network, device=torch.device("cpu"))
    tokens = torch.arange(3, 30)[None]
    assert torch.equal(network(tokens).logits, plain(tokens).logits)
    # With a cache, layers are given fewer positions than they have seen.
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(network.generate(tokens, **settings), plain.generate(tokens, **settings))


def test_another_network_of_the_family_notices_nothing() -> None:
    from transformers.models.lfm2 import modeling_lfm2

    before = dict(vars(modeling_lfm2))
    TrieModel(build("lfm2"), device=torch.device("cpu"))
    assert dict(vars(modeling_lfm2)) == before


@pytest.mark.parametrize("lengths", [[1, 2], [5], [4, 4, 4]])
def test_short_and_equal_rows_are_computed(lengths: list[int]) -> None:
    """Rows shorter than the window, one row alone, all rows the same."""
    tokens = [list(range(3, 4 + n)) for n in lengths]
    flat = [t for row in tokens for t in row]
    offsets = np.concatenate(([0], np.cumsum([len(row) for row in tokens]))).astype(np.int64)
    batch = FlatSequences(np.array(flat, np.int32), np.array(flat, np.int32), offsets)
    for family in ("lfm2", "granitemoehybrid"):
        network = build(family).double()
        with precision(torch.float64):
            assert error_of(on_batches(network, batch), on_rows(network, batch)) < FP64_TOLERANCE


def test_explicit_masks_are_not_those_of_layers_with_a_state() -> None:
    """Windows and states in one network: the mask of all pairs is no padding mask."""
    from types import SimpleNamespace

    from trietune.model.attention.explicit_mask import explicit_masks
    from trietune.trie import build_trie

    batch = batch_of()
    trie = build_trie(batch.input_ids, batch.labels, batch.offsets)
    layout = TrieLayout(trie, kind="mask", num_heads=1, num_key_heads=1, device=torch.device("cpu"))
    kinds = ["linear_attention", "sliding_attention", "conv", "full_attention"]
    masks = explicit_masks(SimpleNamespace(layer_types=kinds, sliding_window=4), layout, torch.float32)
    assert isinstance(masks, dict)
    assert {kind for kind, mask in masks.items() if mask is None} == {"linear_attention", "conv"}
    assert set(masks) == set(kinds)
