"""Decoder layers that know that they run on a trie.

attention    queries, keys and values come from one product with their common input, rotary angles are applied in three
             passes, and heads stay beside their node, so nothing is transposed
last layer   only hidden states at label positions are asked of it: only those query, and only they go through the
             output projection and the MLP; keys and values are made for all nodes

Both are written once for all families that project, rotate and attend alike, and take the place of a layer's own code
only after they have given its result on a short sequence. Without a trie (generation, padded rows) transformers' code
runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from trietune.model.attention.attend import attend
from trietune.model.attention.layout import TrieLayout, visibility
from trietune.model.decoder_layers import decoder_of
from trietune.model.fast.frozen_weight import Whole, keep_joined
from trietune.model.fast.linear import FrozenLayer, JoinedLinear
from trietune.model.replaced import replace_forward
from trietune.trie import IGNORED_LABEL, Trie, build_trie

OBSERVER = "trietune-observer"
PROBE_TOKENS = 9
# Units of the dtype's own rounding by which two ways to sum a few thousand products may differ, of the largest number.
PROBE_TOLERANCE = 50


@dataclass(frozen=True, slots=True)
class TrieLayers:
    """How many layers attend by our code, and whether the last one computes label positions only."""

    attentions: int
    prunes_last: bool


def fuse_trie_layers(network: Any, whole: Whole = nullcontext) -> TrieLayers:
    """Replace attention, and the last decoder layer, where the replacement is proven to agree.

    Args:
        whole: a context in which all weights of a module are here, for a network that is sharded over processes.
    """
    layers = getattr(decoder_of(network), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return TrieLayers(0, False)
    attentions: list[_Attention | None] = []
    for layer in layers:
        # Each layer for itself: some layers of a class rotate and others do not (SmolLM3, EXAONE 4).
        with whole(layer):
            attention = _Attention.of(getattr(layer, "self_attn", None))
            if attention is not None and not _agrees(attention.module.forward, attention, network.device):
                attention = None
            if attention is not None:
                replace_forward(attention.module, _attention_forward(attention, attention.module.forward))
                keep_joined(attention.module, attention.joined.weight)
            attentions.append(attention)
    last = attentions[-1]
    with whole(layers[-1]):
        prunes_last = last is not None and _prune(layers[-1], last, network.device)
    return TrieLayers(sum(attention is not None for attention in attentions), prunes_last)


@dataclass(frozen=True, slots=True)
class _Attention:
    """The parts of a family's attention module; `inputs` are queries, keys and values."""

    module: Any
    inputs: tuple[FrozenLayer, FrozenLayer, FrozenLayer]
    joined: JoinedLinear
    num_heads: int
    num_key_heads: int
    head_size: int
    scale: float
    window: int | None
    softcap: float | None

    @classmethod
    def of(cls, module: Any) -> _Attention | None:
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "config")
        if module is None or not all(hasattr(module, name) for name in names):
            return None
        inputs = tuple(FrozenLayer.of(getattr(module, name)) for name in ("q_proj", "k_proj", "v_proj"))
        if any(layer is None for layer in inputs):
            return None
        told = _observe(module, inputs[0].weight.weights[0])  # type: ignore[union-attr]  # none is None
        if told is None or told.get("scaling") is None:
            return None
        joined = JoinedLinear(inputs)  # type: ignore[arg-type]  # none is None
        return cls(
            module,
            inputs,  # type: ignore[arg-type]  # none is None
            joined,
            joined.sizes[0] // module.head_dim,
            joined.sizes[1] // module.head_dim,
            int(module.head_dim),
            float(told["scaling"]),
            told.get("sliding_window"),
            told.get("softcap"),
        )

    def is_active(self) -> bool:
        return self.joined.is_active()

    def attend(self, normed: Tensor, rotary: tuple[Tensor, Tensor], layout: TrieLayout) -> Tensor:
        """Attention of all nodes, with its output projection: [1, T, D] -> [1, T, D]."""
        query, key, value = self._heads(
            self.joined(normed), (self.num_heads, self.num_key_heads, self.num_key_heads), "qk", rotary
        )
        return self._attend(query, key, value, layout, is_pruned=False)

    def attend_at(
        self,
        normed: Tensor,
        rotary: tuple[Tensor, Tensor],
        layout: TrieLayout,
        at: Tensor,
        of_queries: JoinedLinear,
        of_keys: JoinedLinear,
    ) -> Tensor:
        """The same where only nodes `at` [N] query: [1, N, D]; `of_keys` projects to keys and values."""
        (query,) = self._heads(
            of_queries(normed.index_select(1, at)),
            (self.num_heads,),
            "q",
            (rotary[0].index_select(1, at), rotary[1].index_select(1, at)),
        )
        key, value = self._heads(of_keys(normed), (self.num_key_heads, self.num_key_heads), "k", rotary)
        return self._attend(query, key, value, layout, is_pruned=True)

    def _heads(
        self, projected: Tensor, num_heads: Sequence[int], kinds: str, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, ...]:
        """Heads [T, H, d] of each kind, normed where the family does so, and rotated; others are only split off."""
        cos, sin = rotary[0][0].unsqueeze(1), rotary[1][0].unsqueeze(1)  # [T, 1, d]
        norms = [getattr(self.module, f"{kind}_norm", None) for kind in kinds]
        if all(norm is None for norm in norms):
            return _split(projected, num_heads, len(kinds), cos, sin)
        pieces = _split(projected, num_heads, 0, cos, sin)
        normed = (piece if norm is None else norm(piece) for norm, piece in zip(norms, pieces, strict=False))
        rotated = [_split(piece, piece.shape[1:2], 1, cos, sin)[0] for piece in normed]
        return *rotated, *pieces[len(kinds) :]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, layout: TrieLayout, *, is_pruned: bool) -> Tensor:
        out = attend(
            query,
            key,
            value,
            layout,
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
            is_pruned=is_pruned,
        )
        projected: Tensor = self.module.o_proj(out.reshape(1, query.shape[0], -1))
        return projected


class SplitHeads(torch.autograd.Function):
    """Heads of one projection, some of them rotated: x [..., (H + G + ...) d] -> [T, H, d], [T, G, d], ...

    Rotated are pairs (i, i + d/2), by their angles: cos and sin [T, 1, d], whose halves are equal.
    """

    @staticmethod
    def forward(
        context: Any, x: Tensor, num_heads: Sequence[int], num_rotated: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, ...]:
        context.save_for_backward(cos, sin)
        context.num_heads, context.num_rotated, context.shape = num_heads, num_rotated, x.shape
        pieces = x.reshape(len(cos), -1, cos.shape[-1]).split_with_sizes(num_heads, 1)
        return tuple(
            _rotate(piece, cos, sin, 1, torch.empty_like(piece, memory_format=torch.contiguous_format))
            if number < num_rotated
            else piece.clone(memory_format=torch.contiguous_format)
            for number, piece in enumerate(pieces)
        )

    @staticmethod
    def backward(context: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = context.saved_tensors
        grad_x = grad_outputs[0].new_empty(len(cos), sum(context.num_heads), cos.shape[-1])
        for number, (grad, piece) in enumerate(
            zip(grad_outputs, grad_x.split_with_sizes(context.num_heads, 1), strict=True)
        ):
            if number < context.num_rotated:
                _rotate(grad, cos, sin, -1, piece)
            else:
                piece.copy_(grad)
        return grad_x.view(context.shape), None, None, None, None


def _split(x: Tensor, num_heads: Sequence[int], num_rotated: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    pieces: tuple[Tensor, ...] = SplitHeads.apply(x, num_heads, num_rotated, cos, sin)  # type: ignore[no-untyped-call]
    return pieces


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int, out: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return out


def _attention_forward(attention: _Attention, library: Callable[..., object]) -> Callable[..., object]:
    def forward(hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        layout = kwargs.get("trie_layout")
        rotary = kwargs.get("position_embeddings")
        if args or rotary is None or not _is_ours(layout) or not attention.is_active():
            return library(hidden_states, *args, **kwargs)
        return attention.attend(hidden_states, rotary, layout), None  # type: ignore[arg-type]  # checked by _is_ours

    return forward


@torch.no_grad()
def _observe(module: Any, weight: Tensor) -> dict[str, Any] | None:
    """What transformers' module tells its attention function: scale, window, soft-capping; None if it calls none."""
    told: list[dict[str, object]] = []

    def observe(_: object, query: Tensor, *others: object, **how: object) -> tuple[Tensor, None]:
        told.append(how)
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register(OBSERVER, observe)
    before = module.config._attn_implementation
    module.config._attn_implementation = OBSERVER
    hidden = torch.zeros(1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    angle = torch.ones(1, 1, int(module.head_dim), dtype=weight.dtype, device=weight.device)
    try:
        module.forward(hidden_states=hidden, position_embeddings=(angle, angle), attention_mask=None)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None
    finally:
        module.config._attn_implementation = before
    return told[0] if len(told) == 1 else None


def _is_ours(layout: object) -> bool:
    return isinstance(layout, TrieLayout) and layout.kind != "mask"


def _prune(layer: Any, attention: _Attention, device: torch.device) -> bool:
    """Let the last layer compute label positions only; False if it is not put together as we know layers to be."""
    names = {name for name, _ in layer.named_children()}
    sandwiched = {
        "self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    }  # fmt: skip
    plain = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    if names not in (plain, sandwiched):
        return False
    library = layer.forward
    pruned = _pruned_layer(layer, attention, is_sandwiched=names == sandwiched)
    if not _layer_agrees(library, pruned, attention, device):
        return False

    def forward(hidden_states: Tensor, *args: object, **kwargs: Any) -> object:
        layout = kwargs.get("trie_layout")
        rotary = kwargs.get("position_embeddings")
        is_pruned = _is_ours(layout) and layout.query_nodes is not None  # type: ignore[union-attr]
        if args or rotary is None or not is_pruned or not attention.is_active():
            return library(hidden_states, *args, **kwargs)
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            # The library checkpoints inside the forward of the class, which this one stands in front of.
            return layer._gradient_checkpointing_func(partial(pruned, rotary=rotary, layout=layout), hidden_states)
        return pruned(hidden_states, rotary, layout)

    replace_forward(layer, forward)
    return True


def _pruned_layer(layer: Any, attention: _Attention, *, is_sandwiched: bool) -> Callable[..., Tensor]:
    of_queries, of_keys = JoinedLinear(attention.inputs[:1]), JoinedLinear(attention.inputs[1:])
    keep_joined(layer, of_keys.weight)

    def forward(hidden: Tensor, rotary: tuple[Tensor, Tensor], layout: TrieLayout) -> Tensor:
        query_nodes = layout.query_nodes
        assert query_nodes is not None
        attended = attention.attend_at(layer.input_layernorm(hidden), rotary, layout, query_nodes, of_queries, of_keys)
        residual = hidden.index_select(1, query_nodes)
        if is_sandwiched:
            residual = residual + layer.post_attention_layernorm(attended)
            out = layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(residual)))
        else:
            residual = residual + attended
            out = layer.mlp(layer.post_attention_layernorm(residual))
        return residual + out  # type: ignore[no-any-return]

    return forward


@torch.no_grad()
def _agrees(library: Callable[..., Any], attention: _Attention, device: torch.device) -> bool:
    hidden, rotary, mask, trie = _probe(attention, device)
    try:
        theirs = library(hidden_states=hidden, position_embeddings=rotary, attention_mask=mask)[0]
        ours = attention.attend(hidden, rotary, _layout(attention, trie, device))
    except (RuntimeError, TypeError, ValueError):
        return False
    return _is_close(ours, theirs)


@torch.no_grad()
def _layer_agrees(
    library: Callable[..., Any], pruned: Callable[..., Tensor], attention: _Attention, device: torch.device
) -> bool:
    hidden, rotary, mask, trie = _probe(attention, device)
    query_nodes = np.array([1, PROBE_TOKENS - 2])
    try:
        theirs = library(hidden, position_embeddings=rotary, attention_mask=mask)
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        ours = pruned(hidden, rotary, _layout(attention, trie, device, query_nodes))
    except (RuntimeError, TypeError, ValueError):
        return False
    return _is_close(ours, theirs[:, query_nodes])


def _probe(attention: _Attention, device: torch.device) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Trie]:
    """Hidden states, rotary angles and a causal mask of one short sequence, and the same sequence as a trie."""
    weight = attention.inputs[0].weight.weights[0]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, PROBE_TOKENS, weight.shape[1], generator=generator)
    angle = torch.rand(1, PROBE_TOKENS, attention.head_size // 2, generator=generator).mul(6)
    angle = torch.cat((angle, angle), -1)
    tokens = np.arange(PROBE_TOKENS + 1, dtype=np.int32)
    labels = np.full(PROBE_TOKENS + 1, IGNORED_LABEL, np.int32)
    labels[-1] = 1
    trie = build_trie(tokens, labels, np.array([0, PROBE_TOKENS + 1]))
    sees = torch.from_numpy(visibility(trie, attention.window))[None, None]
    mask = torch.zeros(sees.shape, dtype=weight.dtype).masked_fill(~sees, torch.finfo(weight.dtype).min)
    cos, sin, hidden, mask = (x.to(device, weight.dtype) for x in (angle.cos(), angle.sin(), hidden, mask))
    return hidden, (cos, sin), mask, trie


def _layout(
    attention: _Attention, trie: Trie, device: torch.device, query_nodes: np.ndarray | None = None
) -> TrieLayout:
    return TrieLayout(
        trie,
        kind="rows",
        num_heads=attention.num_heads,
        num_key_heads=attention.num_key_heads,
        device=device,
        query_nodes=query_nodes,
    )


def _is_close(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = PROBE_TOLERANCE * torch.finfo(theirs.dtype).eps * theirs.abs().max()
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance)
