"""The parts of a decoder layer that touch every number, in fewer passes over memory and with their own backward.

RMSNorm        the library casts to fp32, squares, averages, scales, casts back: eight passes, and more backward
gated MLP      gate and up projection read the same input; with their adapters they are one function

A part is replaced only after its fused form has given the library's result on random input, so a family with its own
idea of a norm or an activation keeps the library's code. Parameters and their names stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trietune.model.frozen_weight import FrozenWeight, fuse_frozen_linears
from trietune.model.lora_linear import LoraWeights, adapter_dtype, fuse_adapters, lora_weights
from trietune.model.trie_layers import TrieLayers, fuse_trie_layers

# In fp32 both forms round a few times; a norm with another formula differs in the first digit.
AGREEMENT = 1e-4
PROBE_ROWS = 5

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Fused:
    """How many modules of each kind run fused."""

    norms: int
    gated_mlps: int


def fuse_network(network: nn.Module) -> TrieLayers:
    """Let every part of `network` run fused that can; says what became of its attention and its last layer."""
    fuse_adapters(network)
    fuse_layers(network)
    fuse_frozen_linears(network)
    return fuse_trie_layers(network)


def fuse_layers(network: nn.Module) -> Fused:
    """Replace the forward of norms and gated MLPs of `network` where the fused form is proven to agree."""
    norms = mlps = 0
    proven: dict[type, bool] = {}
    for module in network.modules():
        if type(module).__name__.endswith("RMSNorm"):
            norms += _fuse_norm(module, proven)
        elif {"gate_proj", "up_proj", "down_proj", "act_fn"} <= {name for name, _ in module.named_children()}:
            mlps += _fuse_mlp(module)
    return Fused(norms, mlps)


class RmsNorm(torch.autograd.Function):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, computed in fp32 and rounded once to `x`'s dtype.

    Inputs: x [..., D], weight [D] fp32, eps. The weight gets no gradient.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=weight.dtype)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        context.save_for_backward(x, weight, inverse)
        return torch.mul(x * inverse, weight, out=torch.empty_like(x))

    @staticmethod
    def backward(context: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = context.saved_tensors
        normed = x * inverse
        grad = grad_out * weight
        mean = (grad * normed).mean(-1, keepdim=True)
        grad.addcmul_(normed, mean, value=-1)
        return torch.mul(grad, inverse, out=torch.empty_like(x)), None, None


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
    scale = (weight.detach() + offset).to(adapter_dtype(weight.dtype))

    def forward(x: Tensor) -> Tensor:
        fused: Tensor = RmsNorm.apply(x, scale, epsilon)  # type: ignore[no-untyped-call]
        return fused

    module.forward = forward
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
    """`act(gate(x)) * up(x)` with both adapters: x [..., D] -> [..., I]. Base weights get no gradient."""

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        gate_weight: FrozenWeight,
        up_weight: FrozenWeight,
        gate_a: Tensor,
        gate_b: Tensor,
        up_a: Tensor,
        up_b: Tensor,
        gate_scale: float,
        up_scale: float,
        activation: Activation,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        both_a = torch.cat((gate_a, up_a)).to(x.dtype)
        scaled_gate_b, scaled_up_b = (gate_b * gate_scale).to(x.dtype), (up_b * up_scale).to(x.dtype)
        low_rank = rows @ both_a.t()
        rank = len(gate_a)
        gate = gate_weight.forward(rows).addmm_(low_rank[:, :rank], scaled_gate_b.t())
        up = up_weight.forward(rows).addmm_(low_rank[:, rank:], scaled_up_b.t())
        context.save_for_backward(rows, both_a, scaled_gate_b, scaled_up_b, low_rank, gate, up)
        context.weights = gate_weight, up_weight
        context.rank, context.scales, context.activation = rank, (gate_scale, up_scale), activation
        return (_act(gate, activation).mul_(up)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(context: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        rows, both_a, gate_b, up_b, low_rank, gate, up = context.saved_tensors
        grad = grad_out.reshape(-1, grad_out.shape[-1])
        grad_up = _act(gate, context.activation).mul_(grad)
        grad_gate = _act_backward(grad * up, gate, context.activation)
        rank, (gate_scale, up_scale) = context.rank, context.scales
        precise = adapter_dtype(rows.dtype)
        grad_low = torch.cat((grad_gate @ gate_b, grad_up @ up_b), 1)
        grad_a = (grad_low.t() @ rows).to(precise)
        grad_gate_b = (grad_gate.t() @ low_rank[:, :rank]).to(precise) * gate_scale
        grad_up_b = (grad_up.t() @ low_rank[:, rank:]).to(precise) * up_scale
        grad_x = None
        if context.needs_input_grad[0]:
            gate_weight, up_weight = context.weights
            grad_x = gate_weight.backward(grad_gate).add_(up_weight.backward(grad_up)).addmm_(grad_low, both_a)
            grad_x = grad_x.view(*grad_out.shape[:-1], -1)
        return grad_x, None, None, grad_a[:rank], grad_gate_b, grad_a[rank:], grad_up_b, None, None, None


def _act(gate: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return nn.functional.silu(gate)
    return nn.functional.gelu(gate, approximate="tanh")


def _act_backward(grad: Tensor, gate: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, gate)  # type: ignore[no-any-return]
    return torch.ops.aten.gelu_backward(grad, gate, approximate="tanh")  # type: ignore[no-any-return]


def _fuse_mlp(module: Any) -> bool:
    gate, up = lora_weights(module.gate_proj), lora_weights(module.up_proj)
    activation = _name_activation(module.act_fn)
    if gate is None or up is None or activation is None or gate.bias is not None or up.bias is not None:
        return False
    library: Callable[[Tensor], Tensor] = module.forward
    forward = _mlp_forward(module, gate, up, activation, library)
    if not _agrees_as_mlp(forward, library, gate.weight.weight):
        return False
    module.forward = forward
    return True


def _mlp_forward(
    module: Any, gate: LoraWeights, up: LoraWeights, activation: Activation, library: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if not (gate.is_active() and up.is_active()):
            return library(x)
        hidden = GatedMlp.apply(  # type: ignore[no-untyped-call]
            x, gate.weight, up.weight, gate.a, gate.b, up.a, up.b, gate.scale, up.scale, activation
        )
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
