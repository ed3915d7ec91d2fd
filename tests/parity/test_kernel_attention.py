"""The two ways of CUDA, on the CPU under stand-ins for their kernels: gradients are those of one row an example.

What a kernel computes is held by its contract (`model/flash_on_cpu.py`); what is proven here is everything around it:
runs and blocks, windows, soft-capping, gathered keys and the sum of their gradients, in every family and every layer.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch

from model.families import FAMILIES
from model.flash_on_cpu import flash_on_cpu
from model.flex_on_cpu import flex_on_cpu
from parity.test_fused_layers import build
from parity.test_gradients import FP32_TOLERANCE, FP64_TOLERANCE, gradients, one_row_an_example, relative_error
from strategies import question_batch
from trietune.model.causal_lm import TrieModel
from trietune.model.fast.norms_and_mlps import fuse_network
from trietune.trie import make_micro_batches, total_weight

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SOFT_CAPPED = ("gemma2",)
WAYS = [(family, way) for family in FAMILIES for way in ("varlen", "flex") if (family, way) != ("gemma2", "varlen")]


def on_cpu(way: str) -> AbstractContextManager[Any]:
    return flash_on_cpu() if way == "varlen" else flex_on_cpu()


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize(("family", "way"), WAYS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, FP64_TOLERANCE), pytest.param(torch.float32, FP32_TOLERANCE, marks=pytest.mark.slow)],
)
def test_gradients_are_those_of_one_row_an_example(
    family: str, way: str, is_fused: bool, dtype: torch.dtype, tolerance: float
) -> None:
    batch = question_batch(np.random.default_rng(3), vocabulary=120)
    loss, expected = one_row_an_example(build(family, dtype), batch)
    network = build(family, dtype)
    prunes_last = is_fused and fuse_network(network).prunes_last
    assert prunes_last == is_fused
    model = TrieModel(network, device=torch.device("cpu"), attention=way, prunes_last=prunes_last)  # type: ignore[arg-type]
    for max_positions in (10_000, 60) if way == "varlen" else (10_000,):
        network.zero_grad()
        micro_batches = make_micro_batches(batch, np.arange(len(batch)), batching="trie", max_positions=max_positions)
        divisor, ours = total_weight(micro_batches), 0.0
        with on_cpu(way):
            for micro_batch in micro_batches:
                losses = model.label_losses(micro_batch)
                part = (losses * torch.from_numpy(micro_batch.label_weight).to(losses.dtype)).sum() / divisor
                part.backward()
                ours += part.item()
        error = relative_error(gradients(network), expected)
        assert abs(ours - loss) / loss < tolerance, f"loss {ours} instead of {loss}"
        assert error < tolerance, f"{family}, {way}, {max_positions}: relative error {error:.1e}"


@pytest.mark.parametrize("way", ["varlen", "flex"])
def test_recomputed_activations_change_no_gradient(way: str) -> None:
    """Layouts pass through checkpointed layers as they are."""
    from trietune.model.base.load import enable_checkpointing

    batch = question_batch(np.random.default_rng(3), vocabulary=120)
    [micro_batch] = make_micro_batches(batch, np.arange(len(batch)), batching="trie", max_positions=10_000)
    found = []
    for is_recomputed in (False, True):
        network: Any = build("mistral", torch.float64)
        model = TrieModel(network, device=torch.device("cpu"), attention=way)  # type: ignore[arg-type]
        if is_recomputed:
            enable_checkpointing(network)
        network.train()
        with on_cpu(way):
            model.label_losses(micro_batch).sum().backward()
        found.append(gradients(network))
    assert relative_error(found[1], found[0]) < FP64_TOLERANCE


def test_soft_capped_families_are_no_matter_for_varlen() -> None:
    batch = question_batch(np.random.default_rng(3), vocabulary=120)
    [micro_batch] = make_micro_batches(batch, np.arange(len(batch)), batching="trie", max_positions=10_000)
    for family in SOFT_CAPPED:
        model = TrieModel(build(family, torch.float64), device=torch.device("cpu"), attention="varlen")
        with flash_on_cpu(), pytest.raises(ValueError, match="not support soft-capping"):
            model.label_losses(micro_batch)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SOFT_CAPPED])
def test_the_kernels_are_called_with_what_they_declare(family: str) -> None:
    """Forward and backward on tensors without data: arguments and shapes go through PyTorch's own declarations."""
    batch = question_batch(np.random.default_rng(3), vocabulary=120)
    [micro_batch] = make_micro_batches(batch, np.arange(len(batch)), batching="trie", max_positions=10_000)
    network = build(family, torch.bfloat16).to("meta")
    model = TrieModel(network, device=torch.device("meta"), attention="varlen")
    model.label_losses(micro_batch).sum().backward()
    adapters = [p for name, p in network.named_parameters() if "lora_" in name]
    assert adapters
    assert all(p.grad is not None and p.grad.shape == p.shape for p in adapters)
