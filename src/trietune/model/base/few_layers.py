"""A random network of a model's own layers, one of each kind, from its configuration alone.

What decides how a layer is computed stays: its class, its width, its heads, how it rotates, whether it has a window,
experts or a state. What only makes it large becomes small: layers alike, the vocabulary, experts, the width of MLPs,
and windows, so that short rows exceed them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from trietune.model.base.load import auto_class, quiet_library

VOCABULARY = 512
WINDOW = 16
MOST_EXPERTS = 16
MOST_IN_AN_MLP = 256
# Short rows are shorter than this, so that a smaller window says nothing more.
_LARGE_WINDOW = 32
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_MLPS = ("ffn_dim", "n_inner", "d_ff")
_LAYERS = ("num_hidden_layers", "num_layers", "depth", "n_layer", "n_layers")


def few_layers(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a causal model's configuration with one layer of each kind, at least two in all."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    _thin(text)
    for value in vars(small).values():
        if isinstance(value, PretrainedConfig) and value is not text:
            _cut(value, dict.fromkeys(_LAYERS, 1))
    return small


def random_network(config: PretrainedConfig, *, seed: int = 20) -> PreTrainedModel:
    """A network of `few_layers(config)` in evaluation mode and fp32; its weights let wrong masks and positions show."""
    with torch.random.fork_rng(devices=[]), quiet_library():
        torch.manual_seed(seed)
        network: PreTrainedModel = (
            auto_class(config.model_type).from_config(few_layers(config), trust_remote_code=False).float()
        )
    randomize(network, seed)
    network.train(False)
    return network


def randomize(network: torch.nn.Module, seed: int = 20) -> None:
    """Matrices keep the scale of their input; norms and biases are off their neutral values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(0.2 * noise)
            elif any(word in name for word in ("embed", "wte", "wpe", "embd")):
                parameter.copy_(0.3 * noise)
            elif "conv" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.3 * min(parameter.shape[-2:]) ** -0.5 * noise)


def _thin(text: PretrainedConfig) -> None:
    number = int(getattr(text, "num_hidden_layers", 2))
    values = vars(text)
    lists = {name: value for name, value in values.items() if isinstance(value, list) and len(value) == number}
    kinds: dict[object, int] = {}
    for index in range(number):
        kinds.setdefault(tuple(str(value[index]) for value in lists.values()), index)
    # Where the first layers are dense and the others have experts, one of each.
    dense = getattr(text, "first_k_dense_replace", None)
    chosen = sorted({*kinds.values(), *([dense] if isinstance(dense, int) and 0 < dense < number else []), number - 1})
    changes: dict[str, object] = {name: [value[index] for index in chosen] for name, value in lists.items()}
    changes |= dict.fromkeys(_LAYERS, len(chosen))
    changes["first_k_dense_replace"] = 1
    changes["num_kv_shared_layers"] = 0
    changes |= dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY)
    changes |= dict.fromkeys(_EXPERTS, MOST_EXPERTS)
    for name, value in values.items():
        if type(value) is not int:
            continue
        if ("intermediate" in name or name in _MLPS) and value > MOST_IN_AN_MLP:
            changes[name] = MOST_IN_AN_MLP
        elif ("window" in name or "chunk" in name) and value > _LARGE_WINDOW:
            changes[name] = WINDOW
        elif name.endswith("_token_id") and value >= VOCABULARY:
            changes[name] = {"bos_token_id": 1, "eos_token_id": 2}.get(name, 0)
    _cut(text, changes)


def _cut(config: PretrainedConfig, changes: dict[str, Any]) -> None:
    """Numbers only become smaller, and nothing is added."""
    for name, value in changes.items():
        before = getattr(config, name, None)
        if (isinstance(before, list) and isinstance(value, list)) or (type(before) is int and before > value):
            setattr(config, name, value)
    if isinstance(getattr(config, "eos_token_id", None), list):
        config.eos_token_id = 2
