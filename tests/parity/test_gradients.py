"""Losses and gradients on a trie are those of one row an example, for every family and every way to attend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from model.families import FAMILIES, in_double
from strategies import FlatSequences, question_batch
from trietune.model.attention import row_blocks as row_layout
from trietune.model.attention import rows as row_attention
from trietune.model.attention.row_blocks import AttentionCost
from trietune.model.causal_lm import TrieModel
from trietune.trie import MicroBatch, make_micro_batches, total_weight

# Sums are taken in another order: a few hundred roundings of relative size 2^-53 and 2^-24.
FP64_TOLERANCE = 1e-10
FP32_TOLERANCE = 1e-5

WAYS = [("trie", "rows"), ("trie", "mask"), ("packed", "rows"), ("padded", None)]
# Costs by which every row is a block of its own, some are joined, all are one.
CUTS = {
    "rows": AttentionCost(bucket=0.0, gathered=0.0, score=1.0),
    "blocks": AttentionCost(bucket=50.0, gathered=1.0, score=0.1),
    "everything": AttentionCost(bucket=1e6, gathered=0.0, score=1e-9, whole=0.0),
}


def build(family: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(7)
    network = FAMILIES[family]()
    return in_double(network) if dtype == torch.float64 else network.to(dtype)


def one_row_an_example(network: nn.Module, batch: FlatSequences) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over labels and all gradients, one plain forward a sequence through transformers alone."""
    network.zero_grad()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for begin, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
        if end - begin < 2:
            continue
        tokens = torch.from_numpy(batch.input_ids[begin:end]).long()[None]
        labels = torch.from_numpy(batch.labels[begin + 1 : end]).long()
        if (labels == -100).all():
            continue
        logits = network(input_ids=tokens, use_cache=False).logits[0, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = total + nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        count += int((labels != -100).sum())
    loss = total / count
    loss.backward()
    return loss.item(), gradients(network)


def with_micro_batches(
    network: nn.Module, batch: FlatSequences, batching: str, attention: str | None, max_positions: int
) -> tuple[float, dict[str, torch.Tensor], int]:
    network.zero_grad()
    model = TrieModel(network, device=torch.device("cpu"), attention=attention)
    micro_batches = make_micro_batches(batch, np.arange(len(batch)), batching=batching, max_positions=max_positions)
    loss = run_backward(model, micro_batches)
    return loss, gradients(network), sum(micro_batch.num_positions for micro_batch in micro_batches)


def run_backward(model: TrieModel, micro_batches: Sequence[MicroBatch]) -> float:
    """Add the gradients of the mean loss over labels of these micro-batches together, which is returned."""
    divisor, loss = total_weight(micro_batches), 0.0
    for micro_batch in micro_batches:
        losses = model.label_losses(micro_batch)
        part = (losses * torch.from_numpy(micro_batch.label_weight).to(losses.dtype)).sum() / divisor
        part.backward()
        loss += part.item()
    return loss


def gradients(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.double().clone() for name, p in network.named_parameters() if p.grad is not None}


def relative_error(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all gradients together over the norm of the reference."""
    assert ours.keys() == theirs.keys()
    difference = sum(((ours[name] - theirs[name]) ** 2).sum() for name in theirs)
    return float((difference / sum((g**2).sum() for g in theirs.values())).sqrt())


@pytest.mark.parametrize(("batching", "attention"), WAYS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FP64_TOLERANCE), (torch.float32, FP32_TOLERANCE)])
def test_gradients_are_those_of_one_row_an_example(
    family: str, batching: str, attention: str | None, dtype: torch.dtype, tolerance: float
) -> None:
    batch = question_batch(np.random.default_rng(3), vocabulary=120)
    loss, expected = one_row_an_example(build(family, dtype), batch)
    network = build(family, dtype)
    for max_positions in (10_000, 60):
        ours, found, _ = with_micro_batches(network, batch, batching, attention, max_positions)
        error = relative_error(found, expected)
        assert abs(ours - loss) / loss < tolerance, f"loss {ours} instead of {loss}"
        assert error < tolerance, f"{family}, {batching}, {attention}, {max_positions}: relative error {error:.1e}"


@pytest.mark.parametrize(("cut", "cost"), CUTS.items())
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_however_a_trie_is_cut(
    family: str, cut: str, cost: AttentionCost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_layout, "attention_cost", lambda **heads: cost)
    wholes: list[bool] = []
    is_whole = row_attention._is_whole
    monkeypatch.setattr(row_attention, "_is_whole", lambda *a: (wholes.append(is_whole(*a)), wholes[-1])[1])
    batch = question_batch(np.random.default_rng(3), vocabulary=120)
    loss, expected = one_row_an_example(build(family, torch.float64), batch)
    network = build(family, torch.float64)
    ours, found, _ = with_micro_batches(network, batch, "trie", "rows", 10_000)
    assert abs(ours - loss) / loss < FP64_TOLERANCE
    assert relative_error(found, expected) < FP64_TOLERANCE
    has_softcap = getattr(network.config, "attn_logit_softcapping", None) is not None
    if cut != "everything" or has_softcap:
        assert not any(wholes)
    else:
        assert any(wholes)


def test_shared_prefix_is_computed_once() -> None:
    batch = question_batch(np.random.default_rng(3), vocabulary=120)
    network = build("llama", torch.float32)
    trie = with_micro_batches(network, batch, "trie", "rows", 10_000)[2]
    packed = with_micro_batches(network, batch, "packed", "rows", 10_000)[2]
    assert trie < packed / 2
