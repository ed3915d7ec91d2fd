"""The base model's own dropout and router noise: found, turned off in training mode, kept where that is asked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from causal_types.small_models import small_network
from trietune.errors import UserError
from trietune.model.adapter.adapter import add_adapter
from trietune.model.base.folder import ModelFolder
from trietune.model.base.randomness import find_draws, rates_in_attention, rates_of, silence_draws, silence_rates
from trietune.model.causal_lm import TrieModel
from trietune.trie import make_micro_batches

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

BASE = ModelFolder(Path("/nowhere"), "owner/tiny", "hub")
# Dropout in modules; in functions of layers; noise on what a router is given; sampling by a router.
RANDOM: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "seed_oss": {},
    "mixtral": {"router_jitter_noise": 0.3},
    "phimoe": {"input_jitter_noise": 0.1},
    "llama": {"attention_dropout": 0.3},
}


def logits_of(network: Any, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    logits: torch.Tensor = network(input_ids=torch.arange(3, 30)[None], use_cache=False).logits
    return logits.detach()


@pytest.mark.parametrize("model_type", RANDOM)
def test_the_base_draws_nothing_in_training_mode_once_it_is_silenced(model_type: str) -> None:
    network = small_network(model_type, **RANDOM[model_type])
    expected = logits_of(network, 0)
    network.train()
    assert not torch.equal(logits_of(network, 1), logits_of(network, 2))
    assert rates_of(network)
    silence_rates(network)
    silence_draws(network)
    assert not find_draws(network)
    assert not [name for name in rates_of(network) if "drop" in name]
    network.train()
    assert network.training
    assert all(block.training for block in network.get_decoder().children())
    assert torch.equal(logits_of(network, 1), logits_of(network, 2))
    assert torch.allclose(logits_of(network, 1), expected, atol=1e-6)


def test_a_router_that_samples_is_kept_in_evaluation_mode_and_its_parts_are_not() -> None:
    network = small_network("phimoe")
    silence_rates(network)
    assert find_draws(network) == ["model.layers.0.mlp.router", "model.layers.1.mlp.router"]
    assert silence_draws(network) == ["model.layers.0.mlp.router", "model.layers.1.mlp.router"]
    network.train()
    assert not network.get_submodule("model.layers.0.mlp.router").training
    assert network.get_submodule("model.layers.0.self_attn").training
    network.eval()
    network.train()
    assert not find_draws(network)


def test_looking_for_draws_changes_neither_modes_nor_the_random_state() -> None:
    network = small_network("gpt2")
    network.train()
    network.transformer.h[0].eval()
    before, state = {m: m.training for m in network.modules()}, torch.random.get_rng_state()
    assert find_draws(network)
    assert before == {m: m.training for m in network.modules()}
    assert torch.equal(state, torch.random.get_rng_state())


def test_something_that_goes_on_drawing_is_an_error_with_a_way_out() -> None:
    network = small_network("llama")

    class Noisy(nn.Identity):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 0.1 * torch.randn_like(x)

    network.model.norm = Noisy()
    with pytest.raises(UserError, match=r"model\.norm.*\n.*base_dropout=True"):
        silence_draws(network)


def test_the_adapters_own_dropout_stays() -> None:
    network = small_network("gpt2")
    silence_rates(network)
    silence_draws(network)
    add_adapter(network, r=4, alpha=8, dropout=0.5, base=BASE)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    network.train()
    assert not torch.equal(logits_of(network, 1), logits_of(network, 2))


def test_dropout_on_attention_weights_is_told_apart() -> None:
    assert rates_in_attention(small_network("gpt2")).keys() >= {"attn_pdrop"}
    assert not rates_in_attention(small_network("gpt2", attn_pdrop=0.0))
    assert rates_of(small_network("gpt2", attn_pdrop=0.0)).keys() >= {"resid_pdrop", "embd_pdrop"}


def test_what_branches_share_is_drawn_once_on_a_trie() -> None:
    """Two examples of one beginning: with the base's dropout on, what they have in common is one draw."""
    network = small_network("gpt2", attn_pdrop=0.0, resid_pdrop=0.5, embd_pdrop=0.5)
    stem = [5, 6, 7, 8]
    rows = [[*stem, 9, 12], [*stem, 10, 13]]
    sequences: Any = SimpleNamespace(
        input_ids=np.array(rows, np.int32).ravel(),
        labels=np.array([-100, -100, -100, 8, 9, 12, -100, -100, -100, 8, 10, 13], np.int32),
        offsets=np.array([0, 6, 12]),
    )
    [micro_batch] = make_micro_batches(sequences, np.arange(2), batching="trie", max_positions=100)
    model = TrieModel(network, device=torch.device("cpu"))
    network.train()
    torch.manual_seed(1)
    losses = model.label_losses(micro_batch).detach()
    torch.manual_seed(2)
    assert not torch.equal(losses, model.label_losses(micro_batch))
    assert micro_batch.trie is not None
    assert micro_batch.trie.num_nodes == len(stem) + 2
    # The label of the shared part is there once, with the weight of both: one draw, one loss.
    assert len(losses) == 5
    assert micro_batch.label_weight.tolist().count(2.0) == 1
