"""A tiny model with random weights of each supported family, for every test that compares two ways to one number.

Each has what makes its family hard: grouped heads, soft-capping, windows shorter than the sequences, biases, norms
inside attention. Weights are large enough that attention is far from uniform: with the library's own initialization
a wrong mask would change the loss in the seventh digit.

    network = in_double(FAMILIES["gemma2"]())     # fp64 throughout, attention by `reference_attention`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask

VOCAB_SIZE = 120
# Shorter than nearly every sequence of the tests, so that a layer that forgets its window is noticed.
SLIDING_WINDOW = 5

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def gemma() -> PreTrainedModel:
    """One key head for all query heads, embeddings tied and scaled, heads wider than hidden / heads."""
    config = GemmaConfig(**_COMMON, num_hidden_layers=2, num_key_value_heads=1, head_dim=16)
    return _random_weights(GemmaForCausalLM(config))


def gemma2() -> PreTrainedModel:
    """Soft-capping of scores and logits, and every other layer with a window."""
    config = Gemma2Config(
        **_COMMON,
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=SLIDING_WINDOW,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
    )
    return _random_weights(Gemma2ForCausalLM(config))


def gemma3() -> PreTrainedModel:
    """Three layers with a window and one without, each kind with its own rotary base; norms on queries and keys."""
    config = Gemma3TextConfig(
        **_COMMON,
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=SLIDING_WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    )
    return _random_weights(Gemma3ForCausalLM(config))


def llama() -> PreTrainedModel:
    """Grouped heads, embeddings not tied."""
    return _random_weights(LlamaForCausalLM(LlamaConfig(**_COMMON, num_hidden_layers=2, num_key_value_heads=2)))


def qwen2() -> PreTrainedModel:
    """Biases on queries, keys and values, and a window in the upper layers only."""
    config = Qwen2Config(
        **_COMMON,
        num_hidden_layers=3,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=SLIDING_WINDOW,
        max_window_layers=1,
    )
    return _random_weights(Qwen2ForCausalLM(config))


def qwen3() -> PreTrainedModel:
    """Norms on queries and keys, embeddings tied."""
    config = Qwen3Config(**_COMMON, num_hidden_layers=2, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
    return _random_weights(Qwen3ForCausalLM(config))


def mistral() -> PreTrainedModel:
    """A window in every layer."""
    config = MistralConfig(**_COMMON, num_hidden_layers=2, num_key_value_heads=2, sliding_window=SLIDING_WINDOW)
    return _random_weights(MistralForCausalLM(config))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mistral": mistral,
}


def with_adapter(family: str, **changes: Any) -> Any:
    """A PEFT model of the family, its adapter on every linear layer and not zero; `changes` go to `LoraConfig`."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    adapted = get_peft_model(FAMILIES[family](), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


def in_double(network: PreTrainedModel) -> PreTrainedModel:
    """The same network in fp64 throughout.

    `network.double()` alone keeps the norms, and the softmax of the library's eager attention, in fp32, which hides
    everything below 1e-7. Changes the network and returns it; attention is then `reference_attention`.
    """
    network.double()
    for module in network.modules():
        if type(module).__name__.endswith("RMSNorm"):
            _norm_in_own_dtype(module)
    network.set_attn_implementation("reference")
    return network


def reference_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as the papers write it, computed in the dtype of its input; registered as `reference`."""
    num_groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(num_groups, dim=1), value.repeat_interleave(num_groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("reference", reference_attention)
AttentionMaskInterface.register("reference", eager_mask)


def _random_weights(network: PreTrainedModel, seed: int = 20) -> PreTrainedModel:
    """Every parameter anew: matrices keep the scale of their input, norms and biases are off their neutral values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                # Embeddings are multiplied by sqrt(hidden) in Gemma and normed at once everywhere: 0.3 suits all.
                parameter.copy_(noise * (0.3 if "embed" in name else 1.3 * parameter.shape[1] ** -0.5))
            else:
                parameter.add_(0.2 * noise)
    network.train(False)
    return network


def _norm_in_own_dtype(module: nn.Module) -> None:
    weight_offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
    epsilon: Any = getattr(module, "variance_epsilon", None) or module.eps

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + epsilon)
        return normed * (weight_offset + module.weight)

    module.forward = forward  # type: ignore[method-assign]
