"""Decoder layers that know that they run on a trie.

attention    queries, keys and values come from one function of their common input, rotary angles are applied in three
             passes, and heads stay beside their node, so nothing is transposed
last layer   only hidden states at label positions are asked of it: only those query, and only they go through the
             output projection and the MLP; keys and values are made for all nodes

Both are written once for all families that project, rotate and attend alike, and take the place of a layer's own code
only after they have given its result on a short sequence. Without a trie (generation, padded rows) the library's code
runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from trietune.model.attention import attend
from trietune.model.frozen_weight import FrozenWeight, frozen_weight
from trietune.model.lora_linear import LoraWeights, adapter_dtype, lora_weights
from trietune.model.trie_layout import TrieLayout, visibility
from trietune.trie import Trie, build_trie

OBSERVER = "trietune-observer"
PROBE_TOKENS = 9
# Units of the dtype's own rounding by which two ways to sum a few thousand products may differ, of the largest number.
PROBE_TOLERANCE = 50


@dataclass(frozen=True, slots=True)
class TrieLayers:
    """How many layers attend by our code, and whether the last one computes label positions alone."""

    attentions: int
    prunes_last: bool


def fuse_trie_layers(network: Any) -> TrieLayers:
    """Replace attention, and the last decoder layer, where the replacement is proven to agree."""
    layers = getattr(network.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return TrieLayers(0, False)
    attentions: list[_Attention | None] = []
    proven: dict[type, bool] = {}
    for layer in layers:
        attention = _Attention.of(getattr(layer, "self_attn", None))
        if attention is not None:
            kind = type(attention.module)
            if kind not in proven:
                proven[kind] = _agrees(attention.module.forward, attention, network.device)
            if not proven[kind]:
                attention = None
        if attention is not None:
            attention.module.forward = _attention_forward(attention, attention.module.forward)
        attentions.append(attention)
    last = attentions[-1]
    prunes_last = last is not None and _prune(layers[-1], last, network.device)
    return TrieLayers(sum(attention is not None for attention in attentions), prunes_last)


@dataclass(frozen=True, slots=True)
class _Linear:
    """A frozen linear layer, with or without a plain adapter."""

    weight: FrozenWeight
    bias: Tensor | None
    lora: LoraWeights | None

    @classmethod
    def of(cls, module: Any) -> _Linear | None:
        lora = lora_weights(module)
        if lora is not None:
            return cls(lora.weight, lora.bias, lora)
        if type(module) is not nn.Linear or any(parameter.requires_grad for parameter in module.parameters()):
            return None
        return cls(frozen_weight(module), module.bias, None)

    def is_active(self) -> bool:
        return self.lora is None or self.lora.is_active()

    def arguments(self) -> tuple[Any, ...]:
        """What `SharedInput` asks for: weight, bias, A, B, scale."""
        if self.lora is None:
            return self.weight, self.bias, None, None, 0.0
        return self.weight, self.bias, self.lora.a, self.lora.b, self.lora.scale


@dataclass(frozen=True, slots=True)
class _Attention:
    """The parts of a family's attention module."""

    module: Any
    inputs: tuple[_Linear, _Linear, _Linear]
    head_size: int
    scale: float
    window: int | None
    softcap: float | None

    @classmethod
    def of(cls, module: Any) -> _Attention | None:
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "config")
        if module is None or not all(hasattr(module, name) for name in names):
            return None
        linears = [_Linear.of(getattr(module, name)) for name in ("q_proj", "k_proj", "v_proj")]
        if any(linear is None for linear in linears):
            return None
        told = _observe(module, linears[0].weight.weight)  # type: ignore[union-attr]  # none is None
        if told is None or told.get("scaling") is None:
            return None
        return cls(
            module,
            tuple(linears),  # type: ignore[arg-type]  # none is None
            int(module.head_dim),
            float(told["scaling"]),
            told.get("sliding_window"),
            told.get("softcap"),
        )

    def is_active(self) -> bool:
        return all(linear.is_active() for linear in self.inputs)

    def attend(
        self, normed: Tensor, rotary: tuple[Tensor, Tensor], layout: TrieLayout, at: Tensor | None = None
    ) -> Tensor:
        """Attention with its output projection: [1, T, D] -> [1, T, D], or [1, N, D] when only nodes `at` query."""
        cos, sin = (angle[0].unsqueeze(1) for angle in rotary)  # [T, 1, d]
        if at is None:
            query, key, value = SharedInput.apply(normed, *_flatten(self.inputs))  # type: ignore[no-untyped-call]
            query_cos, query_sin = cos, sin
        else:
            query = SharedInput.apply(normed.index_select(1, at), *_flatten(self.inputs[:1]))[0]  # type: ignore[no-untyped-call]
            key, value = SharedInput.apply(normed, *_flatten(self.inputs[1:]))  # type: ignore[no-untyped-call]
            query_cos, query_sin = cos.index_select(0, at), sin.index_select(0, at)
        query, key = (x.view(-1, x.shape[-1] // self.head_size, self.head_size) for x in (query, key))
        if (norm := getattr(self.module, "q_norm", None)) is not None:
            query, key = norm(query), self.module.k_norm(key)
        query = Rotary.apply(query, query_cos, query_sin)  # type: ignore[no-untyped-call]
        key = Rotary.apply(key, cos, sin)  # type: ignore[no-untyped-call]
        value = value.view(key.shape)
        out = attend(
            query,
            key,
            value,
            layout,
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
            of_needed=at is not None,
        )
        projected: Tensor = self.module.o_proj(out.reshape(1, query.shape[0], -1))
        return projected


class SharedInput(torch.autograd.Function):
    """Several linear layers of one input, each with or without an adapter: x [..., D] -> one [rows, out] for each.

    After `x` come weight, bias, A, B and scale of each layer, None where there is no bias or adapter. Base weights and
    biases get no gradient.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, *layers: Any) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        linears = [layers[first : first + 5] for first in range(0, len(layers), 5)]
        adapters = [a for _, _, a, _, _ in linears if a is not None]
        all_a = torch.cat(adapters).to(x.dtype) if adapters else None
        low_rank = None if all_a is None else rows @ all_a.t()
        outputs: list[Tensor] = []
        saved: list[Tensor | None] = []
        spans: list[tuple[int, int, float] | None] = []
        first = 0
        for weight, bias, a, b, scale in linears:
            out = weight.forward(rows, bias)
            scaled_b = None
            if a is not None and low_rank is not None:
                scaled_b = (b * scale).to(x.dtype)
                out.addmm_(low_rank[:, first : first + len(a)], scaled_b.t())
                spans.append((first, first + len(a), scale))
                first += len(a)
            else:
                spans.append(None)
            outputs.append(out)
            saved.append(scaled_b)
        context.save_for_backward(rows, all_a, low_rank, *saved)
        context.weights, context.spans, context.shape = [linear[0] for linear in linears], spans, x.shape
        return tuple(outputs)

    @staticmethod
    def backward(context: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, all_a, low_rank, *saved = context.saved_tensors
        needs_x = context.needs_input_grad[0]
        grad_x: Tensor | None = None
        grads_low, grads_b = [], []
        for number, (grad, span) in enumerate(zip(grad_outputs, context.spans, strict=True)):
            scaled_b = saved[number]
            if needs_x:
                through = context.weights[number].backward(grad)
                grad_x = through if grad_x is None else grad_x.add_(through)
            if span is not None:
                begin, end, scale = span
                grads_low.append(grad @ scaled_b)
                grads_b.append((grad.t() @ low_rank[:, begin:end]).to(adapter_dtype(rows.dtype)) * scale)
        results: list[Tensor | None] = []
        if grads_low:
            grad_low = torch.cat(grads_low, 1)
            if grad_x is not None:
                grad_x.addmm_(grad_low, all_a)
            grad_a = (grad_low.t() @ rows).to(adapter_dtype(rows.dtype))
        next_b = iter(grads_b)
        for span in context.spans:
            grads = (None, None) if span is None else (grad_a[span[0] : span[1]], next(next_b))
            results.extend((None, None, *grads, None))
        return (None if grad_x is None else grad_x.view(context.shape), *results)


class Rotary(torch.autograd.Function):
    """Rotate pairs (i, i + d/2) by their angles: x [T, H, d], cos and sin [T, 1, d] whose halves are equal."""

    @staticmethod
    def forward(context: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        context.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(context: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = context.saved_tensors
        return _rotate(grad_out, cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return out


def _flatten(linears: Sequence[_Linear]) -> list[Any]:
    return [argument for linear in linears for argument in linear.arguments()]


def _attention_forward(attention: _Attention, library: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout = kwargs.get("trie_layout")
        rotary = kwargs.get("position_embeddings")
        if args or rotary is None or not _is_ours(layout) or not attention.is_active():
            return library(hidden_states, *args, **kwargs)
        return attention.attend(hidden_states, rotary, layout), None  # type: ignore[arg-type]  # checked by _is_ours

    return forward


@torch.no_grad()
def _observe(module: Any, weight: Tensor) -> dict[str, Any] | None:
    """What the library's module tells its attention function: scale, window, soft-capping; None if it calls none."""
    told: list[dict[str, Any]] = []

    def observe(_: Any, query: Tensor, *others: Any, **how: Any) -> tuple[Tensor, None]:
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
    """Let the last layer compute label positions alone; False if it is not put together as we know layers to be."""
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

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout = kwargs.get("trie_layout")
        rotary = kwargs.get("position_embeddings")
        is_pruned = _is_ours(layout) and layout.needed is not None  # type: ignore[union-attr]
        if args or rotary is None or not is_pruned or not attention.is_active():
            return library(hidden_states, *args, **kwargs)
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            # The library checkpoints inside the forward of the class, which this one stands in front of.
            return layer._gradient_checkpointing_func(partial(pruned, rotary=rotary, layout=layout), hidden_states)
        return pruned(hidden_states, rotary, layout)

    layer.forward = forward
    return True


def _pruned_layer(layer: Any, attention: _Attention, *, is_sandwiched: bool) -> Callable[..., Tensor]:
    def forward(hidden: Tensor, rotary: tuple[Tensor, Tensor], layout: TrieLayout) -> Tensor:
        needed = layout.needed
        assert needed is not None
        attended = attention.attend(layer.input_layernorm(hidden), rotary, layout, needed)
        residual = hidden.index_select(1, needed)
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
    needed = np.array([1, PROBE_TOKENS - 2])
    try:
        theirs = library(hidden, position_embeddings=rotary, attention_mask=mask)
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        ours = pruned(hidden, rotary, _layout(attention, trie, device, needed))
    except (RuntimeError, TypeError, ValueError):
        return False
    return _is_close(ours, theirs[:, needed])


def _probe(attention: _Attention, device: torch.device) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Trie]:
    """Hidden states, rotary angles and a causal mask of one short sequence, and the same sequence as a trie."""
    weight = attention.inputs[0].weight.weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, PROBE_TOKENS, weight.shape[1], generator=generator)
    angle = torch.rand(1, PROBE_TOKENS, attention.head_size // 2, generator=generator).mul(6)
    angle = torch.cat((angle, angle), -1)
    tokens = np.arange(PROBE_TOKENS + 1, dtype=np.int32)
    labels = np.full(PROBE_TOKENS + 1, -100, np.int32)
    labels[-1] = 1
    trie = build_trie(tokens, labels, np.array([0, PROBE_TOKENS + 1]))
    sees = torch.from_numpy(visibility(trie, attention.window))[None, None]
    mask = torch.zeros(sees.shape, dtype=weight.dtype).masked_fill(~sees, torch.finfo(weight.dtype).min)
    cos, sin, hidden, mask = (x.to(device, weight.dtype) for x in (angle.cos(), angle.sin(), hidden, mask))
    return hidden, (cos, sin), mask, trie


def _layout(attention: _Attention, trie: Trie, device: torch.device, needed: np.ndarray | None = None) -> TrieLayout:
    query, key = (len(linear.weight.weight) // attention.head_size for linear in attention.inputs[:2])
    return TrieLayout(trie, kind="rows", num_heads=query, num_key_heads=key, device=device, needed=needed)


def _is_close(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = PROBE_TOLERANCE * torch.finfo(theirs.dtype).eps * theirs.abs().max()
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance)
