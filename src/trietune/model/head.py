"""A model's head, whatever it consists of: its own forward around a decoder that returns the hidden states given to it.

    hidden [N, D] -> as one row -> what the model does after its decoder -> logits [N, V]

So scales, soft-capping, norms and dense layers of a head are the model's own, and no list of their names is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trietune.model.decoder_layers import decoder_of


class Head:
    """Logits of hidden states, through `network` (a causal language model of transformers) without its decoder."""

    def __init__(self, network: Any) -> None:
        self._network = network
        self._kind_of_output: Any = None
        self._handle = decoder_of(network).register_forward_hook(self._note)

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] of last hidden states [N, D], with gradients."""
        network = self._network
        decoder = decoder_of(network)
        # The token is never looked at: it stands where a call must have one.
        token = torch.zeros(1, 1, dtype=torch.long, device=hidden_ND.device)
        if self._kind_of_output is None:
            with torch.no_grad():
                decoder(input_ids=token, use_cache=False)
        output = self._kind_of_output(last_hidden_state=hidden_ND[None])
        before = vars(decoder).get("forward")
        decoder.forward = lambda *args, **kwargs: output
        # Wrappers of text and images ask for more inputs in training; their own code has nothing else to do with it.
        wrappers = [
            module for module in (network, network.base_model) if module is not decoder and vars(module)["training"]
        ]
        try:
            for module in wrappers:
                module.training = False
            logits: Tensor = network(input_ids=token, use_cache=False, return_dict=True).logits
        finally:
            for module in wrappers:
                module.training = True
            if before is None:
                del decoder.forward
            else:
                decoder.forward = before
        return logits[0]

    def _note(self, module: torch.nn.Module, args: Any, output: object) -> None:
        """The decoder's first call tells what kind of object the head takes its hidden states from."""
        self._kind_of_output = type(output)
        self._handle.remove()
