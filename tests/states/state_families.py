"""Tiny random models whose layers carry a state: each kind of state, with its odd sizes and one attention at least.

with in_double():                      # transformers' own casts to fp32 are to fp64
    network = build("lfm2").double()
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCAB_SIZE = 120

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 64, "max_position_embeddings": 512,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 24,
    "mamba_n_groups": 2, "mamba_chunk_size": 16, "chunk_size": 16, "mamba_dt_rank": 4, "mamba_d_ssm": 96,
    "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 24, "n_groups": 2, "conv_kernel": 4, "expand": 2,
    "state_size": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "linear_head_dim": 12, "linear_num_heads": 4,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 4, "v_head_dim": 12,
    "first_k_dense_replace": 1,
}  # fmt: skip
_MIXED = ["linear_attention", "full_attention", "linear_attention"]

FAMILIES: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "qwen3_5_text": {"layer_types": _MIXED},
    "qwen3_5_moe_text": {"layer_types": _MIXED},
    "qwen3_next": {"layer_types": _MIXED},
    "olmo_hybrid": {"layer_types": _MIXED, "num_key_value_heads": 4, "linear_num_key_heads": 4},
    "kimi_linear": {"layer_types": _MIXED, "num_key_value_heads": 4, "head_dim": None},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"], "position_embedding_type": "rope", "logits_scaling": 6.0,
    },
    "bamba": {"attn_layer_indices": [1]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "mlp"]},
    "falcon_h1": {},
    "mamba2": {"head_dim": 24, "num_heads": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}  # fmt: skip


def config_of(family: str, **changes: Any) -> Any:
    cls = CONFIG_MAPPING[family]
    known = {field.name for field in dataclasses.fields(cls)}
    values = {**_SIZES, **FAMILIES.get(family, {}), **changes}
    return cls(**{name: value for name, value in values.items() if name in known and value is not None})


def build(family: str, seed: int = 20, **changes: Any) -> Any:
    """In evaluation mode; weights so large that a wrong state shows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(
            config_of(family, **changes), attn_implementation="eager", experts_implementation="eager"
        ).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(0.2 * noise)
            elif "embed" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * (0.5 if "conv" in name else 1.3 * min(parameter.shape[-2:]) ** -0.5))
    network.train(False)
    return network


@contextmanager
def in_double() -> Iterator[None]:
    """fp32 means fp64 in the modelling files that are loaded: `torch.float32`, `.float()` and casts alike.

    Networks are built before: their angles are kept as they were made.
    """

    class Proxy(types.ModuleType):
        float32 = float = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    modules: list[Any] = [
        module for name, module in sys.modules.items()
        if name.startswith("transformers.models.") and getattr(module, "torch", None) is torch
    ]  # fmt: skip
    single = torch.Tensor.float
    for module in modules:
        module.torch = Proxy("torch")
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.float = single  # type: ignore[method-assign]
        for module in modules:
            module.torch = torch
