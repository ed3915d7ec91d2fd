"""The parts of a decoder layer that touch every number, in fewer passes over memory and with their own backward.

RMSNorm        transformers casts to fp32, squares, averages, scales, casts back: eight passes, and more backward
gated MLP      gate and up projection read the same input; with their adapters they are one function

A part is replaced only after its fused form has given transformers' result on random input, so a family with its own
idea of a norm or an activation keeps transformers' code. Parameters and their names stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trietune.model.fast.attention_layer import TrieLayers, fuse_trie_layers
from trietune.model.fast.frozen_weight import Whole, keep_joined
from trietune.model.fast.linear import FrozenLayer, JoinedLinear, adapter_dtype, fuse_linears
from trietune.model.replaced import replace_forward

# In fp32 both forms round a few times; a norm with another formula differs in the first digit.
AGREEMENT = 1e-4
PROBE_ROWS = 5

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Fused:
    """How many modules of each kind run fused."""

    norms: int
    gated_mlps: int


def fuse_network(network: nn.Module, whole: Whole = nullcontext) -> TrieLayers:
    """Let every part of `network` run fused that can; says what became of its attention and its last layer.

    Args:
        whole: a context in which all weights of a module are here, for a network that is sharded over processes.
    """
    fuse_linears(network)
    fuse_layers(network, whole)
    return fuse_trie_layers(network, whole)


def fuse_layers(network: nn.Module, whole: Whole = nullcontext) -> Fused:
    """Replace the forward of norms and gated MLPs of `network` where the fused form is proven to agree."""
    norms = mlps = 0
    proven: dict[type, bool] = {}
    for module in network.modules():
        if type(module).__name__.endswith("RMSNorm"):
            with whole(module):
                norms += _fuse_norm(module, proven)
        elif {"gate_proj", "up_proj", "down_proj", "act_fn"} <= {name for name, _ in module.named_children()}:
            with whole(module):
                mlps += _fuse_mlp(module)
    return Fused(norms, mlps)


class RmsNorm(torch.autograd.Function):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, computed in fp32 and rounded once to `x`'s dtype.

    Inputs: x [..., D], weight [D] fp32, eps. The weight gets no gradient.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # Cast once: an operation between bf16 and fp32 casts for itself, every time.
        precise = x.to(weight.dtype, copy=True)
        inverse = torch.linalg.vector_norm(precise, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        context.save_for_backward(x, weight, inverse)
        return precise.mul_(inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(context: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = context.saved_tensors
        normed = x.to(weight.dtype, copy=True).mul_(inverse)
        grad = grad_out.to(weight.dtype, copy=True).mul_(weight)
        mean = (grad * normed).mean(-1, keepdim=True)
        return grad.addcmul_(normed, mean, value=-1).mul_(inverse).to(x.dtype), None, None


def _fuse_norm(module: nn.Module, proven: dict[type, bool]) -> bool:
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.requires_grad or not isinstance(epsilon, float):
        return False
    # Gemma's norms keep their weight as a difference from one.
    offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
    if type(module) not in proven:
        proven[type(module)] = _agrees_as_norm(module, offset, epsilon)
    if not proven[type(module)]:
        return False
    # Cast, then add, as transformers does: in bf16 a sum near one keeps two or three digits of Gemma's weights.
    scale = weight.detach().to(adapter_dtype(weight.dtype)) + offset

    library: Callable[..., Tensor] = module.forward

    def forward(*args: Any, **kwargs: object) -> Tensor:
        if len(args) != 1 or kwargs:
            return library(*args, **kwargs)
        x: Tensor = args[0]
        fused: Tensor = RmsNorm.apply(x, scale, epsilon)  # type: ignore[no-untyped-call]
        return fused

    replace_forward(module, forward)
    return True


@torch.no_grad()
def _agrees_as_norm(module: nn.Module, offset: float, epsilon: float) -> bool:
    weight: Any = module.weight
    x = torch.linspace(-2, 3, PROBE_ROWS * len(weight), device=weight.device).view(PROBE_ROWS, -1)
    scale = weight.float() + offset
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * scale
    # The library multiplies by a weight in the base's dtype, so only the formula can be compared there, in fp32.
    try:
        theirs: Tensor = module(x)
    except RuntimeError:
        return False
    return theirs.shape == x.shape and bool((theirs.float() - expected).abs().max() <= AGREEMENT * expected.abs().max())


class GatedMlp(torch.autograd.Function):
    """`act(gate(x)) * up(x)` with both adapters: x [..., D] -> [..., I]. Base weights get no gradient.

    `linear` is gate and up, joined; its A, B, A, B follow.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, linear: JoinedLinear, activation: Activation, *adapters: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        gate_up, kept = linear.forward(rows)
        context.save_for_backward(rows, gate_up, *kept)
        context.linear, context.activation = linear, activation
        gate, up = gate_up.chunk(2, 1)
        return _act(gate, activation).mul_(up).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(context: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate_up, *kept = context.saved_tensors
        grad = grad_out.reshape(-1, grad_out.shape[-1])
        gate, up = gate_up.chunk(2, 1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, 1)
        torch.mul(_act(gate, context.activation), grad, out=grad_up)
        _act_backward(grad * up, gate, context.activation, out=grad_gate)
        grad_x, grads = context.linear.backward(grad_gate_up, rows, kept, needs_x=context.needs_input_grad[0])
        return (None if grad_x is None else grad_x.view(*grad_out.shape[:-1], -1)), None, None, *grads


def _act(gate: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return nn.functional.silu(gate)
    return nn.functional.gelu(gate, approximate="tanh")


def _act_backward(grad: Tensor, gate: Tensor, activation: Activation, *, out: Tensor) -> None:
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=out)
    else:
        torch.ops.aten.gelu_backward.grad_input(grad, gate, approximate="tanh", grad_input=out)


def _fuse_mlp(module: Any) -> bool:
    gate, up = FrozenLayer.of(module.gate_proj), FrozenLayer.of(module.up_proj)
    activation = _name_activation(module.act_fn)
    if gate is None or up is None or activation is None:
        return False
    linear = JoinedLinear([gate, up])
    library: Callable[[Tensor], Tensor] = module.forward
    forward = _mlp_forward(module, linear, activation, library)
    if not _agrees_as_mlp(forward, library, gate.weight.weights[0]):
        return False
    replace_forward(module, forward)
    keep_joined(module, linear.weight, instead_of=(gate.weight, up.weight))
    return True


def _mlp_forward(
    module: Any, linear: JoinedLinear, activation: Activation, library: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: object) -> Tensor:
        if len(args) != 1 or kwargs or not linear.is_active():
            return library(*args, **kwargs)
        x: Tensor = args[0]
        hidden = GatedMlp.apply(x, linear, activation, *linear.adapters)  # type: ignore[no-untyped-call]
        out: Tensor = module.down_proj(hidden)
        return out

    return forward


@torch.no_grad()
def _agrees_as_mlp(forward: Callable[[Tensor], Tensor], library: Callable[[Tensor], Tensor], weight: Tensor) -> bool:
    x = torch.linspace(-1, 1, PROBE_ROWS * weight.shape[1], device=weight.device, dtype=weight.dtype)
    x = x.view(1, PROBE_ROWS, -1)
    ours, theirs = forward(x), library(x)
    # Sums of a few thousand products in `weight`'s dtype, each form rounding at its own places.
    tolerance = 20 * torch.finfo(weight.dtype).eps
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-6))


def _name_activation(module: nn.Module) -> Activation | None:
    probe = torch.linspace(-4, 4, 33)
    try:
        theirs = module(probe)
    except RuntimeError:
        return None
    names: tuple[Activation, ...] = ("silu", "gelu_tanh")
    for name in names:
        if torch.allclose(theirs, _act(probe, name), atol=1e-6):
            return name
    return None
