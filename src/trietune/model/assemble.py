"""A network with its adapter becomes a model that takes micro-batches, in the way that its device computes best."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

from transformers import PreTrainedModel

from trietune.device import Device
from trietune.model.attention.layout import AttentionKind
from trietune.model.base.load import enable_checkpointing
from trietune.model.causal_lm import TrieModel
from trietune.model.fast.frozen_weight import Whole, pack_frozen_weights
from trietune.model.fast.norms_and_mlps import fuse_network
from trietune.trie.static_shapes import StaticShapes

# Of the free memory, for blocked copies of weights; micro-batches are bounded by `device.memory.USABLE_SHARE`.
PACKED_SHARE = 0.3


def assemble(
    network: PreTrainedModel,
    device: Device,
    *,
    attention: AttentionKind | None,
    fused_layers: bool,
    pack_weights: bool | Literal["auto"] = False,
    shapes: StaticShapes | None = None,
    gradient_checkpointing: bool = False,
    whole: Whole = nullcontext,
    why_whole_rows: str | None = None,
) -> TrieModel:
    """Take `network` from `device.loading_device` to the device, and say how its parts run there.

    Args:
        attention: how tries attend; None for padded rows, which keep transformers' attention.
        fused_layers: whether parts run as functions with a backward of their own, where the device gains by that.
        pack_weights: whether fused parts keep frozen weights blocked for the matrix library; `auto`: as many as fit
            into a part of the memory that is free now.
        shapes: what micro-batches are padded to, on a device of static shapes.
        gradient_checkpointing: whether activations are computed again in the backward pass.
        whole: a context in which all weights of a module are here, for a network that is sharded over processes.
        why_whole_rows: the reason why tries run on whole rows, `architecture.why_whole_rows`.
    """
    if device.place_network is not None:
        device.place_network(network)
    prunes_last = False
    packed_bytes = 0
    if fused_layers and device.runs_own_backwards:
        prunes_last = fuse_network(network, whole).prunes_last
        if pack_weights:
            bound = int(PACKED_SHARE * device.free_memory_bytes()) if pack_weights == "auto" else None
            packed_bytes = pack_frozen_weights(network, most_bytes=bound)
    if gradient_checkpointing:
        enable_checkpointing(network, device.recompute)
    return TrieModel(
        network,
        device=device.torch_device,
        attention=attention,
        prunes_last=prunes_last,
        shapes=shapes,
        to_device=device.to_device,
        recompute=device.recompute,
        packed_bytes=packed_bytes,
        whole=whole,
        why_whole_rows=why_whole_rows,
    )
