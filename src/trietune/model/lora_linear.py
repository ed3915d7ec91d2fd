"""A linear layer and its LoRA adapter as one function with its own backward.

    y = x W' + s (x A') B'        A [r, in] and B [out, r] in fp32, x and W in the base's dtype

PEFT computes the adapter's branch in fp32, so it casts the whole of `x` up and the branch's output down again, at every
layer, forward and backward. Here the small matrices are cast instead. What is kept for the backward is `x`, which the
layer's neighbours keep too, and `x A'`, which is r numbers a node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trietune.model.frozen_weight import FrozenWeight, frozen_weight


class LoraLinear(torch.autograd.Function):
    """Inputs: x [..., in], the frozen weight, bias [out] or None, A [r, in], B [out, r], scale; output [..., out].

    Products run in `x`'s dtype and accumulate in fp32; the gradients of A and B are returned in their own dtype. The
    base's weight and bias get none.
    """

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a, scaled_b = a.to(x.dtype), (b * scale).to(x.dtype)
        low_rank = rows @ a.t()
        out = weight.forward(rows, bias)
        out.addmm_(low_rank, scaled_b.t())
        context.save_for_backward(rows, a, scaled_b, low_rank)
        context.weight, context.scale = weight, scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(context: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        rows, a, scaled_b, low_rank = context.saved_tensors
        grad = grad_out.reshape(-1, grad_out.shape[-1])
        grad_low_rank = grad @ scaled_b
        grad_a = (grad_low_rank.t() @ rows).to(adapter_dtype(rows.dtype))
        grad_b = (grad.t() @ low_rank).to(adapter_dtype(rows.dtype)) * context.scale
        grad_x = None
        if context.needs_input_grad[0]:
            grad_x = context.weight.backward(grad)
            grad_x.addmm_(grad_low_rank, a)
            grad_x = grad_x.view(*grad_out.shape[:-1], -1)
        return grad_x, None, None, grad_a, grad_b, None


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the adapter's weights over a base in `dtype`: fp32, or fp64 over fp64."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """The tensors of one plain LoRA layer: y = x W' + bias + scale (x A') B'."""

    layer: Any
    adapter: str
    weight: FrozenWeight
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float

    def is_active(self) -> bool:
        """Whether PEFT would add exactly this adapter now."""
        layer = self.layer
        return not layer.disable_adapters and not layer.merged and layer.active_adapters == [self.adapter]


def fuse_adapters(network: nn.Module) -> int:
    """Let plain LoRA layers of `network` run as `LoraLinear`; returns how many do.

    Layers with dropout, DoRA, adapter biases, trained base biases, several adapters, or a base that is no plain linear
    layer keep PEFT's forward. Parameters and their names stay as they are.
    """
    fused = 0
    for module in network.modules():
        weights = lora_weights(module)
        if weights is not None:
            module.forward = _fused_forward(weights)
            fused += 1
    return fused


def lora_weights(module: nn.Module) -> LoraWeights | None:
    """The tensors of a LoRA layer of the plain kind; None for everything else."""
    from peft.tuners.lora.layer import Linear

    if type(module) is not Linear or len(module.active_adapters) != 1:
        return None
    layer: Any = module
    base, adapter = layer.get_base_layer(), layer.active_adapters[0]
    if type(base) is not nn.Linear or adapter not in layer.lora_A:
        return None
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    is_plain = (
        isinstance(layer.lora_dropout[adapter], nn.Identity)
        and not layer.use_dora[adapter]
        and b.bias is None
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
    )
    if not is_plain:
        return None
    return LoraWeights(
        layer, adapter, frozen_weight(base), base.bias, a.weight, b.weight, float(layer.scaling[adapter])
    )


def _fused_forward(weights: LoraWeights) -> Any:
    by_peft = weights.layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not weights.is_active():
            out: Tensor = by_peft(x, *args, **kwargs)
            return out
        fused: Tensor = LoraLinear.apply(  # type: ignore[no-untyped-call]
            x, weights.weight, weights.bias, weights.a, weights.b, weights.scale
        )
        return fused

    return forward
