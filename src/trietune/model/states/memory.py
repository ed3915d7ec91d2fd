"""What the scans of layers with a state keep for their backward pass, counted on a copy without memory.

Their chunks, states and copies in fp32 are several times what a layer's products keep, and no configuration says how
much: one mixer of each kind runs a chunk of positions on the device `meta`, and what autograd saves is added up.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trietune.device.memory import Widths
from trietune.model.decoder_layers import decoder_layers
from trietune.model.states.hand_on import carries_states, mixers_in, scans_states
from trietune.model.states.kinds import LONGEST_CHUNK

# Why tries of such networks are not computed on devices of static shapes, as the end of a sentence.
STATES_HAVE_MANY_LENGTHS = "its layers carry a state, which is scanned in segments of many lengths"
# Steps scanned a node: padding, chunks and what is scanned twice. 1.3 to 1.5 on SQuAD and on conversations.
STEPS_PER_NODE = 1.5


def with_scans(widths: Widths, network: PreTrainedModel) -> Widths:
    """`widths` with what the scans of `network` keep."""
    if not carries_states(network):
        return widths
    found = bytes_of_scans(network)
    return replace(widths, scanned=sum(found), widest_scan=max(found, default=0))


def bytes_of_scans(given: PreTrainedModel) -> list[int]:
    """Bytes that each decoder layer's mixers save for a position; 0 for layers that scan nothing.

    Args:
        given: with weights or without; nothing of it is computed.
    """
    found: list[int] = []
    known: dict[object, int] = {}
    with torch.device("meta"):
        network: object = type(given)(copy.deepcopy(given.config))
        for layer in decoder_layers(network):
            total = 0
            for mixer in mixers_in(layer):
                kind = type(mixer), *(tuple(p.shape) for p in mixer.parameters())
                if kind not in known:
                    known[kind] = _saved_by(mixer, int(given.config.get_text_config().hidden_size))
                total += known[kind]
            found.append(int(STEPS_PER_NODE * total))
    return found


def _saved_by(mixer: Any, hidden_size: int) -> int:
    """Bytes saved for a position; 0 if the mixer scans nothing, or cannot be run by itself."""
    if not scans_states(mixer):
        return 0
    storages: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        kept.append(tensor)  # so that no other storage takes its place
        return tensor

    kept: list[Tensor] = []
    weights = sum(p.untyped_storage().nbytes() for p in mixer.parameters())
    hidden = torch.empty(1, LONGEST_CHUNK, hidden_size, device="meta", requires_grad=True)
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            mixer(hidden_states=hidden)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        return 0
    return int(max(sum(storages.values()) - weights, 0)) // LONGEST_CHUNK
