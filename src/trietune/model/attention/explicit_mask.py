"""Masks in the form that transformers makes them, for layers whose own attention function runs on a trie.

A window that a layer does not tell its attention function lives only in this mask; so do masks that a layer changes
before it attends (Doge). Whether the masks are those that a family means is not assumed: layers that read them are
proven with them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING as MASKS_OF_KINDS
from transformers.masking_utils import create_recurrent_attention_mask

from trietune.model.attention.layout import TrieLayout
from trietune.model.attention.static_layout import StaticLayout


def explicit_masks(
    config: object, layout: TrieLayout | StaticLayout, dtype: torch.dtype
) -> Tensor | dict[str, Tensor | None]:
    """0 where a node sees another and the least number of `dtype` elsewhere: [S, 1, W, W], one for each kind of layer.

    Args:
        config: the text config of a causal model of transformers, whose `layer_types` and `sliding_window` are read.

    Returns:
        One mask where all kinds see the same (every decoder passes four axes through), else one by kind; None for
        layers that carry a state.
    """
    window = getattr(config, "sliding_window", None)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if not kinds:
        return _additive(layout.mask(window), dtype)
    # Layers with a state take a padding mask instead, and a trie has none.
    states = [kind for kind in kinds if MASKS_OF_KINDS.get(kind) is create_recurrent_attention_mask]
    kinds = [kind for kind in kinds if kind not in states]
    if not kinds:
        return _additive(layout.mask(window), dtype)
    sees = {kind: layout.mask(window if kind == "sliding_attention" else None) for kind in kinds}
    if all(mask is sees[kinds[0]] for mask in sees.values()):
        return _additive(sees[kinds[0]], dtype)
    return {**dict.fromkeys(states), **{kind: _additive(mask, dtype) for kind, mask in sees.items()}}


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)
