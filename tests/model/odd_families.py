"""Tiny random models of families whose layers differ from what a trie's own attention knows.

Each has one trap: layers that do not rotate, windows that live in the mask alone, masks that depend on values, sinks,
heads of several layers, states along the sequence. Weights are large enough that a mistake shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 120
# Shorter than the longest rows of a proof's short forest, so that even that exceeds it; see `LONG_WINDOW`.
SHORT_WINDOW = 5
# Longer than the short forest: only the longest example exceeds it.
LONG_WINDOW = 40

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "exaone4": {"sliding_window": SHORT_WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "doge": {"keep_window_size": 512},
    "qwen2_moe": {
        **_EXPERTS, "use_sliding_window": True, "sliding_window": LONG_WINDOW, "max_window_layers": 2,
        "moe_intermediate_size": 40, "shared_expert_intermediate_size": 40,
    },
    "phimoe": {**_EXPERTS, "sliding_window": LONG_WINDOW},
    "gpt_oss": {**_EXPERTS, "head_dim": 16, "sliding_window": SHORT_WINDOW, "initializer_range": 0.5},
    "mistral": {"sliding_window": LONG_WINDOW},
    "olmo2": {},
    "lfm2": {"full_attn_idxs": [1, 3], "block_multiple_of": 16},
    "cohere": {"logit_scale": 0.3},
    "granite": {
        "logits_scaling": 3.0, "residual_multiplier": 0.7, "embedding_multiplier": 2.0, "attention_multiplier": 0.2,
    },
}  # fmt: skip


def odd(family: str, **changes: Any) -> PreTrainedModel:
    """A network of the family, in evaluation mode; `changes` go to its configuration."""
    config = AutoConfig.for_model(family, **{**_COMMON, **CONFIGS[family], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)  # biases and sinks keep a part of what they are initialized with
        network = AutoModelForCausalLM.from_config(config).float()
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(0.2 * noise)
            elif "embed" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1.3 * min(parameter.shape[-2:]) ** -0.5 * noise)
    network.train(False)
    return network  # type: ignore[no-any-return]


def with_adapter(network: Any, targets: Any = ("q_proj", "k_proj", "v_proj", "o_proj")) -> Any:
    """An adapter on its attention, not zero; the network itself is returned."""
    from peft import LoraConfig, get_peft_model

    get_peft_model(
        network, LoraConfig(r=3, lora_alpha=7, target_modules=list(targets), task_type="CAUSAL_LM"),
        autocast_adapter_dtype=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def in_dtype(build: Callable[[], Any], dtype: torch.dtype) -> Any:
    """The base in `dtype`, its rotary angles in fp32 and the adapter in fp32, as a run holds them."""
    network = build()
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    network.config.dtype = dtype
    return with_adapter(network)
