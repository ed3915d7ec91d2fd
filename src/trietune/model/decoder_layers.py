"""Which module of a network is its text decoder, and which are the layers of that."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def decoder_of(network: Any) -> Any:
    """The module between tokens and the last hidden states, without towers for other inputs and without the head."""
    decoder = network.get_decoder()
    if not isinstance(decoder, PreTrainedModel):
        # ModernBERT calls its output head so.
        decoder = network.base_model
    # Some classes name a causal model as their decoder, or themselves.
    while (head := _head_of(decoder)) is not None:
        inner = [
            child
            for child in decoder.children()
            if isinstance(child, PreTrainedModel) and not any(module is head for module in child.modules())
        ]
        if len(inner) != 1:
            return decoder
        decoder = inner[0]
    return decoder


def _head_of(module: Any) -> nn.Module | None:
    head: nn.Module | None = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None  # type: ignore[no-untyped-call]
    return head


def decoder_layers(network: Any) -> nn.ModuleList:
    """The list of modules that holds most of the decoder's parameters; empty where there is none."""
    lists = [module for module in decoder_of(network).modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return nn.ModuleList()
    return max(lists, key=lambda module: sum(p.numel() for p in module.parameters()))
