"""The weight of a linear layer that nobody trains, ready to be multiplied from both sides.

    forward   x [T, in] -> x W' [T, out]        backward   g [T, out] -> g W [T, in]

A matrix library blocks a weight for its registers and caches at every product. A weight that stays the same can be
blocked once and kept so, as oneDNN does for inference; here for both directions. On CPU that makes products of many
rows faster by 15 %, of few rows by half, in fp32 on some processors by more than twice (`benchmarks/products.py`). It
costs memory: a second and a third copy of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PACKED_DTYPES = (torch.bfloat16, torch.float32)


class FrozenWeight:
    """A weight [out, in] and, if they may be made, its blocked copies, each made when it is first multiplied with.

    A weight that is changed afterwards (a merged adapter, a loaded state) is multiplied as it is.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.may_pack = False
        self._forward: Tensor | None = None
        self._backward: Tensor | None = None
        self._version = weight._version

    def forward(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """`rows` [T, in] times W', plus the bias: [T, out]."""
        if not self._packs(rows):
            return nn.functional.linear(rows, self.weight, bias)
        if self._forward is None:
            self._forward = _blocked(self.weight.detach())
        return _product(rows, self._forward, bias)

    def backward(self, grad: Tensor) -> Tensor:
        """`grad` [T, out] times W: [T, in]."""
        if not self._packs(grad):
            return grad @ self.weight
        if self._backward is None:
            self._backward = _blocked(self.weight.detach().t())
        return _product(grad, self._backward, None)

    def _packs(self, operand: Tensor) -> bool:
        return self.may_pack and operand.dtype == self.weight.dtype and self.weight._version == self._version


def _blocked(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return packed


def _product(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), packed, bias, "none", [], "")
    return out


class FrozenLinear(torch.autograd.Function):
    """`x W' + bias` for x [..., in] and a `FrozenWeight`; weight and bias get no gradient."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
        context.weight = weight
        return weight.forward(x.reshape(-1, x.shape[-1]), bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(context: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if not context.needs_input_grad[0]:
            return None, None, None
        grad = context.weight.backward(grad_out.reshape(-1, grad_out.shape[-1]))
        return grad.view(*grad_out.shape[:-1], -1), None, None


def frozen_weight(module: Any) -> FrozenWeight:
    """The one `FrozenWeight` of a linear layer, made when it is first asked for."""
    known: FrozenWeight | None = module.__dict__.get("frozen_weight")
    if known is None or known.weight is not module.weight:
        known = module.__dict__["frozen_weight"] = FrozenWeight(module.weight)
    return known


def fuse_frozen_linears(network: nn.Module) -> int:
    """Let plain linear layers without an adapter or a trained parameter run as `FrozenLinear`; returns how many do."""
    from peft.tuners.lora.layer import LoraLayer

    inner = {id(layer.base_layer) for layer in network.modules() if isinstance(layer, LoraLayer)}
    fused = 0
    for module in network.modules():
        if type(module) is nn.Linear and id(module) not in inner and not _is_trained(module):
            module.forward = _frozen_forward(module)  # type: ignore[method-assign]
            fused += 1
    return fused


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _frozen_forward(module: nn.Linear) -> Any:
    def forward(x: Tensor) -> Tensor:
        out: Tensor = FrozenLinear.apply(x, frozen_weight(module), module.bias)  # type: ignore[no-untyped-call]
        return out

    return forward


def pack_frozen_weights(network: nn.Module, *, most_bytes: int | None = None) -> int:
    """Let frozen weights of `network` be packed, layer after layer, while all copies take at most `most_bytes`.

    Returns what the copies will take. Nothing is packed where the matrix library has no such products: off the CPU, or
    in another dtype.
    """
    found = (module.__dict__.get("frozen_weight") for module in network.modules())
    total = 0
    for frozen in found:
        if not isinstance(frozen, FrozenWeight) or not _can_pack(frozen.weight):
            continue
        num_bytes = 2 * frozen.weight.numel() * frozen.weight.element_size()
        if most_bytes is None or total + num_bytes <= most_bytes:
            frozen.may_pack = True
            total += num_bytes
    return total


def _can_pack(weight: Tensor) -> bool:
    is_built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_built and weight.device.type == "cpu" and weight.dtype in PACKED_DTYPES
