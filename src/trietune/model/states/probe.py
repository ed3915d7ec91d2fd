"""What mixes positions in a network with states: a copy without weights runs on a few tokens, and takes notes.

Every decoder layer must attend through transformers' interface, or call one of the functions of `kinds`, and be told
of the trie. A layer that does neither must be given only hidden states in all its parts. What passes here is proven
with values and gradients before a run trains (`model.proof`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from trietune.model.decoder_layers import decoder_layers, decoder_of
from trietune.model.states.hand_on import carry_states, mixers_in
from trietune.model.states.kinds import Place, Run

_NAME = "trietune-states-probe"
_NUM_TOKENS = 4
# A part whose forward names one of these mixes positions, or may.
_MIXES = {"attention_mask", "past_key_values", "past_key_value", "cache_params", "position_embeddings", "position_ids"}


class _Notes:
    """A carrier that computes nothing: outputs have the shape of the first input."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.attending: list[nn.Module] = []
        self.untold: list[nn.Module] = []

    @property
    def carrier(self) -> _Notes:
        return self

    def window(self, place: Place, x: Tensor, width: int, run: Callable[[Tensor], Tensor]) -> Tensor:
        self.places.append(place)
        return x

    def scan(self, place: Place, inputs: list[Tensor], run: Run) -> Tensor:
        self.places.append(place)
        return inputs[0]

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: object, **told: object
    ) -> tuple[Tensor, None]:
        (self.attending if told.get("trie_layout") is self else self.untold).append(module)
        batch, num_heads, length, _ = query.shape
        return query.new_empty(batch, length, num_heads, value.shape[-1]), None


def refuse_mixing(given: PreTrainedModel) -> str | None:
    """Why the layers of such a network cannot be computed on a trie, as the end of a sentence; None if they can.

    Args:
        given: some layers of which have mixers; with weights or without.
    """
    family, notes = str(given.config.model_type), _Notes()
    AttentionInterface.register(_NAME, notes.attend)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    with torch.device("meta"):
        network: Any = type(given)(copy.deepcopy(given.config))
        carry_states(network)
        has_stopped = False
        try:
            network.set_attn_implementation(_NAME)
            run_decoder(network, notes)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, NotImplementedError):
            # Experts are chosen by values, which a copy without weights has none of.
            has_stopped = True
    layers = decoder_layers(network)
    reached = {id(module) for module in notes.attending} | {id(mixer) for mixer, _ in _called(layers, notes)}
    untold = {id(module) for module in notes.untold}
    # Nothing was seen at all: the first layer says why.
    num_run = (_num_run(layers, reached | untold) or 1) if has_stopped else len(layers)
    for layer in layers[:num_run]:
        inside = {id(module) for module in layer.modules()}
        name = type(layer).__name__
        if any(id(mixer) not in reached for mixer in mixers_in(layer)):
            return f"`{family}` does not tell its layers with a state (`{name}`) of the trie"
        if inside & untold:
            return f"`{family}` does not tell its attention (`{name}`) of the trie"
        if not inside & reached and _may_mix(layer):
            return f"`{family}` has layers (`{name}`) that mix positions in their own way, which cannot be replaced"
    return None


def run_decoder(network: object, told: object) -> None:
    """Run the decoder on a few tokens as a trie's layers are run."""
    tokens = torch.zeros(1, _NUM_TOKENS, dtype=torch.long)
    decoder = decoder_of(network)
    inputs: dict[str, object] = {"input_ids": tokens, "attention_mask": torch.zeros(1, 1, 1, 1), "use_cache": False}
    decoder(**inputs, position_ids=tokens, trie_layout=told)


def _called(layers: nn.ModuleList, notes: _Notes) -> list[tuple[nn.Module, Place]]:
    """Each mixer that was called with the notes as its carrier."""
    return [(mixers_in(layers[place.layer])[place.mixer], place) for place in notes.places]


def _num_run(layers: nn.ModuleList, seen: set[int]) -> int:
    """Layers that were run before the network stopped: up to the last one that was seen."""
    run = [number for number, layer in enumerate(layers) if seen & {id(module) for module in layer.modules()}]
    return max(run) + 1 if run else 0


def _may_mix(layer: nn.Module) -> bool:
    """Whether some part of a layer takes more than hidden states."""
    return any(
        _MIXES & set(inspect.signature(type(child).forward).parameters)
        for child in layer.modules()
        if child is not layer
    )
