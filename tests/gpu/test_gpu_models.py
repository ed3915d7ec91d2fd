"""Whole models on the card: every family in every way that it can attend, against plain rows through transformers.

fp32    losses and adapter gradients on the card are those of fp64 on the CPU, to the digits that fp32 keeps
bf16    they err no more than padded rows do on the same card
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from model.families import FAMILIES, _random_weights, in_double
from parity.test_gradients import gradients, one_row_an_example, relative_error
from strategies import question_batch
from trietune.model.adapter.adapter import add_adapter
from trietune.model.base.folder import ModelFolder
from trietune.model.causal_lm import TrieModel
from trietune.model.fast.norms_and_mlps import fuse_network
from trietune.trie import make_micro_batches, total_weight

# PEFT 0.21 asks transformers 5.23 by a name that the latter has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# Of all gradients together. Sums in fp32, in another order and on another device; no 10-bit products (TF32).
FP32_TOLERANCE = 1e-4
SPREAD = 1.5
HEAD_SIZE = 64
# The kernel of `varlen` knows no soft-capping.
WAYS = [(f, w) for f in FAMILIES for w in ("varlen", "flex", "rows", "mask") if (f, w) != ("gemma2", "varlen")]


def adapted(family: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The family with heads that kernels take, an adapter away from zero, and the same weights each time."""
    small = FAMILIES[family]()
    config = small.config
    config.head_dim = HEAD_SIZE
    network = _random_weights(type(small)(config))
    add_adapter(network, base=ModelFolder(Path(), "base", "folder"), r=3, alpha=7)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    if dtype == torch.float64:
        return in_double(network)
    network.to(device, dtype)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return network


def batched(network: nn.Module, device: torch.device, batching: str, **how: Any) -> dict[str, torch.Tensor]:
    """Adapter gradients of the mean loss, on the host."""
    batch = question_batch(np.random.default_rng(5), vocabulary=120)
    network.zero_grad()
    model = TrieModel(network, device=device, **how)
    micro_batches = make_micro_batches(batch, np.arange(len(batch)), batching=batching, max_positions=10_000)  # type: ignore[arg-type]
    for micro_batch in micro_batches:
        losses = model.label_losses(micro_batch)
        weight = torch.from_numpy(micro_batch.label_weight / total_weight(micro_batches)).to(losses)
        torch.dot(losses, weight).backward()
    return {name: grad.cpu() for name, grad in gradients(network).items()}


def truth(family: str) -> dict[str, torch.Tensor]:
    network = adapted(family, torch.float64, torch.device("cpu"))
    return one_row_an_example(network, question_batch(np.random.default_rng(5), vocabulary=120))[1]


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize(("family", "way"), WAYS)
def test_bf16(device: torch.device, family: str, way: str, is_fused: bool) -> None:
    expected = truth(family)
    padded = relative_error(
        batched(adapted(family, torch.bfloat16, device), device, "padded", attention=None), expected
    )
    network = adapted(family, torch.bfloat16, device)
    prunes_last = is_fused and fuse_network(network).prunes_last
    found = relative_error(batched(network, device, "trie", attention=way, prunes_last=prunes_last), expected)
    assert found < SPREAD * padded, f"{family}, {way}: {found:.1e}, padded rows {padded:.1e}"


@pytest.mark.parametrize(("family", "way"), [(f, w) for f, w in WAYS if w != "varlen"])
def test_fp32(device: torch.device, family: str, way: str) -> None:
    network = adapted(family, torch.float32, device)
    prunes_last = fuse_network(network).prunes_last
    error = relative_error(batched(network, device, "trie", attention=way, prunes_last=prunes_last), truth(family))
    assert error < FP32_TOLERANCE, f"{family}, {way}: {error:.1e}"


def test_trap_3_positions_that_fall_back_are_no_packed_rows(device: torch.device) -> None:
    """At batch size 1 transformers guesses packed sequences from such positions, unless a mask has four axes."""
    network = adapted("llama", torch.float32, device)
    assert relative_error(batched(network, device, "trie", attention="mask"), truth("llama")) < FP32_TOLERANCE
    shuffled = batched(network, device, "packed", attention="mask")
    assert relative_error(shuffled, truth("llama")) < FP32_TOLERANCE
