"""Which module of a network is its text decoder, and which are the layers of that."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_CALLED = "trietune_called_by_text"


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


def _head_of(module: object) -> nn.Module | None:
    head: nn.Module | None = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None  # type: ignore[no-untyped-call]
    return head


def decoder_layers(network: object) -> nn.ModuleList:
    """The list of modules that holds most of the decoder's parameters, of those that text passes; empty without any."""
    decoder = decoder_of(network)
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module)]
    inner = {id(part) for outer in lists for part in outer.modules() if part is not outer}
    outermost = [module for module in lists if id(module) not in inner]
    if len(outermost) > 1:
        # Towers for images and sounds have layers, too, and some decoders hold them.
        name_of = {id(module): name for name, module in decoder.named_modules()}
        called = _called_by_text(network, decoder)
        outermost = [
            module for module in outermost if any(name_of[id(layer)] in called for layer in module)
        ] or outermost
    return max(outermost, key=lambda module: sum(p.numel() for p in module.parameters()), default=nn.ModuleList())


def _called_by_text(network: Any, decoder: nn.Module) -> set[str]:
    """Names of the modules that the decoder calls for a few tokens; found once for each network."""
    known: set[str] | None = vars(decoder).get(_CALLED)
    if known is not None:
        return known
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: called.add(name))
        for name, module in decoder.named_modules()
    ]
    tokens = torch.zeros(1, 2, dtype=torch.long, device=network.get_input_embeddings().weight.device)
    try:
        # Without weights experts cannot be chosen; what was called before says enough.
        with torch.no_grad(), suppress(RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError):
            decoder(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    vars(decoder)[_CALLED] = called
    return called
