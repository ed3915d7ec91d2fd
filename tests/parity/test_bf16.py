"""In bf16 a trie errs no more than padded rows do: both are compared with the gradients in fp64.

Two padded batchings of the same examples differ among themselves, because sums are taken in another order and every
layer rounds to 8 bits. So no fixed number is asked of the trie, only that it stays within that spread.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.families import FAMILIES, in_double, with_adapter
from parity.test_gradients import gradients, one_row_an_example, relative_error
from strategies import FlatSequences, question_batch
from trietune.model.causal_lm import TrieModel
from trietune.model.fast.norms_and_mlps import fuse_network
from trietune.trie import make_micro_batches, total_weight

# Errors of single draws scatter; the trie's may be this much of the larger of the two that padded rows make.
SPREAD = 1.5

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def network_in(family: str, dtype: torch.dtype) -> torch.nn.Module:
    network = with_adapter(family).base_model.model
    if dtype == torch.float64:
        # The same weights as in bf16, so that only the arithmetic differs.
        return in_double(network.to(torch.bfloat16).float())
    network.to(dtype)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return network  # type: ignore[no-any-return]


def batched(network: torch.nn.Module, batch: FlatSequences, batching: str, **how: object) -> dict[str, torch.Tensor]:
    network.zero_grad()
    model = TrieModel(network, device=torch.device("cpu"), **how)  # type: ignore[arg-type]
    micro_batches = make_micro_batches(batch, np.arange(len(batch)), batching=batching, max_positions=10_000)  # type: ignore[arg-type]
    for micro_batch in micro_batches:
        losses = model.label_losses(micro_batch)
        weight = torch.from_numpy(micro_batch.label_weight / total_weight(micro_batches)).to(losses.dtype)
        torch.dot(losses, weight).backward()
    return gradients(network)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trie_errs_no_more_than_padded_rows(family: str) -> None:
    batch = question_batch(np.random.default_rng(5), vocabulary=120)
    truth = one_row_an_example(network_in(family, torch.float64), batch)[1]
    alone = relative_error(one_row_an_example(network_in(family, torch.bfloat16), batch)[1], truth)
    padded = relative_error(batched(network_in(family, torch.bfloat16), batch, "padded", attention=None), truth)
    plain = relative_error(batched(network_in(family, torch.bfloat16), batch, "trie"), truth)
    network = network_in(family, torch.bfloat16)
    prunes_last = fuse_network(network).prunes_last
    assert prunes_last
    fused = relative_error(batched(network, batch, "trie", prunes_last=True), truth)
    bound = SPREAD * max(alone, padded)
    assert plain < bound, f"{family}: trie {plain:.1e}, one row an example {alone:.1e}, padded {padded:.1e}"
    assert fused < bound, f"{family}: fused trie {fused:.1e}, one row an example {alone:.1e}, padded {padded:.1e}"
