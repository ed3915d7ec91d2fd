"""Every optimisation of the layers on: adapter gradients on a trie are those of the library, one row an example."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.families import FAMILIES, in_double, with_adapter
from parity.test_gradients import (
    FP32_TOLERANCE,
    FP64_TOLERANCE,
    gradients,
    one_row_an_example,
    relative_error,
)
from strategies import question_batch
from trietune.model.causal_lm import TrieModel
from trietune.model.fast.norms_and_mlps import fuse_network
from trietune.trie import make_micro_batches, total_weight

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def build(family: str, dtype: torch.dtype, **changes: object) -> torch.nn.Module:
    adapted = with_adapter(family, **changes)
    network = adapted.base_model.model  # type: ignore[union-attr]
    return in_double(network) if dtype == torch.float64 else network.to(dtype)  # type: ignore[arg-type, operator, return-value]


@pytest.mark.parametrize("targets", ["all-linear", pytest.param(["q_proj", "v_proj"], marks=pytest.mark.slow)])
@pytest.mark.parametrize("batching", ["trie", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FP64_TOLERANCE), (torch.float32, FP32_TOLERANCE)])
def test_gradients_with_every_layer_replaced(
    family: str, batching: str, targets: str | list[str], dtype: torch.dtype, tolerance: float
) -> None:
    batch = question_batch(np.random.default_rng(5), vocabulary=120)
    loss, expected = one_row_an_example(build(family, dtype, target_modules=targets), batch)
    network = build(family, dtype, target_modules=targets)
    found = fuse_network(network)
    assert found.attentions == network.config.num_hidden_layers  # type: ignore[union-attr]
    assert found.prunes_last
    model = TrieModel(network, device=torch.device("cpu"), prunes_last=True)
    for max_positions in (10_000, 60):
        network.zero_grad()
        micro_batches = make_micro_batches(batch, np.arange(len(batch)), batching=batching, max_positions=max_positions)  # type: ignore[arg-type]
        divisor, ours = total_weight(micro_batches), 0.0
        for micro_batch in micro_batches:
            losses = model.label_losses(micro_batch)
            part = (losses * torch.from_numpy(micro_batch.label_weight).to(losses.dtype)).sum() / divisor
            part.backward()
            ours += part.item()
        error = relative_error(gradients(network), expected)
        assert abs(ours - loss) / loss < tolerance, f"loss {ours} instead of {loss}"
        assert error < tolerance, f"{family}, {batching}, {max_positions}: relative error {error:.1e}"


def test_the_last_layer_computes_label_positions_alone() -> None:
    network = build("llama", torch.float32)
    assert fuse_network(network).prunes_last
    model = TrieModel(network, device=torch.device("cpu"), prunes_last=True)
    batch = question_batch(np.random.default_rng(5), vocabulary=120)
    [micro_batch] = make_micro_batches(batch, np.arange(len(batch)), batching="trie", max_positions=10_000)
    seen: list[int] = []
    for layer in network.get_decoder().layers:  # type: ignore[operator]
        layer.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    model.label_losses(micro_batch)
    num_needed = len(np.unique(micro_batch.label_index))
    assert seen == [-(-micro_batch.num_positions // 16) * 16, num_needed]
    assert num_needed < micro_batch.num_positions / 2
