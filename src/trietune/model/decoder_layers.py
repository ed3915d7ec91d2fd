"""Which modules are a network's decoder layers."""

from __future__ import annotations

from typing import Any

from torch import nn


def decoder_layers(network: Any) -> nn.ModuleList:
    """The list of modules that holds most of the decoder's parameters; empty where there is none."""
    lists = [module for module in network.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return nn.ModuleList()
    return max(lists, key=lambda module: sum(p.numel() for p in module.parameters()))
