"""Linear layers of one input, with their LoRA adapters, as one function with its own backward.

    y = x W' + s (x A') B'        A [r, in] and B [out, r] in fp32, x and W in the base's dtype

PEFT computes the adapter's branch in fp32, so it casts the whole of `x` up and the branch's output down again, at every
layer, forward and backward. Here the small matrices are cast instead. What is kept for the backward pass is `x`, which
the layer's neighbors keep too, and `x A'`, which is r numbers per node.

Queries, keys and values read the same `x`, gate and up another: such layers are one here, their W and A under each
other, their B along a diagonal. So a layer costs four wide products a pass instead of seven, and as many thin ones.

Letters: T nodes, D inputs, O outputs of all joined layers, R ranks of all their adapters.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trietune.model.fast.frozen_weight import FrozenWeight, frozen_weight
from trietune.model.replaced import replace_forward


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """A plain LoRA adapter: scale (x A') B'."""

    layer: Any
    name: str
    a: Tensor
    b: Tensor
    scale: float

    def is_active(self) -> bool:
        """Whether PEFT would add exactly this adapter now."""
        layer = self.layer
        return not layer.disable_adapters and not layer.merged and layer.active_adapters == [self.name]


@dataclass(frozen=True, slots=True)
class FrozenLayer:
    """A linear layer whose weight and bias are frozen, with or without a plain adapter."""

    weight: FrozenWeight
    lora: LoraWeights | None

    @property
    def bias(self) -> Tensor | None:
        """As it is now."""
        return self.weight.modules[0].bias

    @classmethod
    def of(cls, module: object) -> FrozenLayer | None:
        """The parts of a layer of the plain kind; None for everything else.

        Of another kind are layers with dropout, DoRA, adapter biases, trained base weights or biases, several adapters,
        or a base that is not a plain linear layer.
        """
        from peft.tuners.lora.layer import Linear

        if type(module) is nn.Linear:
            return None if _is_trained(module) else cls(frozen_weight(module), None)
        if type(module) is not Linear or len(module.active_adapters) != 1:
            return None
        layer: Any = module
        base, name = layer.get_base_layer(), layer.active_adapters[0]
        if type(base) is not nn.Linear or _is_trained(base) or name not in layer.lora_A:
            return None
        a, b = layer.lora_A[name], layer.lora_B[name]
        is_plain = isinstance(layer.lora_dropout[name], nn.Identity) and not layer.use_dora[name] and b.bias is None
        if not is_plain:
            return None
        lora = LoraWeights(layer, name, a.weight, b.weight, float(layer.scaling[name]))
        return cls(frozen_weight(base), lora)


def _is_trained(module: nn.Linear) -> bool:
    return any(parameter.requires_grad for parameter in (module.weight, module.bias) if parameter is not None)


class JoinedLinear:
    """Layers of one input as one layer, whose outputs lie beside each other."""

    def __init__(self, layers: Sequence[FrozenLayer]) -> None:
        self._layers = tuple(layers)
        is_single = len(layers) == 1
        self.weight = layers[0].weight if is_single else FrozenWeight(*(layer.weight.modules[0] for layer in layers))
        self._joined_bias = None if is_single else _join_biases(layers)
        self.sizes = [len(layer.weight.weights[0]) for layer in layers]
        loras = [layer.lora for layer in layers if layer.lora is not None]
        ends = list(itertools.accumulate(self.sizes))
        self._outputs = [slice(ends[n] - size, ends[n]) for n, size in enumerate(self.sizes) if layers[n].lora]
        rank_ends = list(itertools.accumulate(len(lora.a) for lora in loras))
        self._ranks = [slice(end - len(lora.a), end) for lora, end in zip(loras, rank_ends, strict=True)]
        self.adapters: tuple[Tensor, ...] = tuple(tensor for lora in loras for tensor in (lora.a, lora.b))
        self._scale_of_rank = [lora.scale for lora in loras for _ in range(len(lora.a))]

    @property
    def bias(self) -> Tensor | None:
        """Of one layer as it is now, of several a copy."""
        return self._layers[0].bias if len(self._layers) == 1 else self._joined_bias

    def is_active(self) -> bool:
        return all(layer.lora is None or layer.lora.is_active() for layer in self._layers)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., O]."""
        out: Tensor = LoraLinear.apply(x, self, *self.adapters)  # type: ignore[no-untyped-call]
        return out

    def forward(self, rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`rows` [T, D] -> [T, O], and what the backward pass wants to have kept."""
        out = self.weight.forward(rows, self.bias)
        if not self.adapters:
            return out, ()
        a, b = self._joined_adapters(rows.dtype)
        low_rank = self._scale(rows @ a.t())
        return out.addmm_(low_rank, b.t()), (a, b, low_rank)

    def backward(
        self, grad: Tensor, rows: Tensor, kept: Sequence[Tensor], *, needs_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """`grad` [T, O] -> the gradients of `rows`, if it is needed, and of `adapters`, in their own dtype."""
        grad_x = self.weight.backward(grad) if needs_x else None
        if not self.adapters:
            return grad_x, []
        a, b, low_rank = kept
        grad_low = self._scale(grad @ b)
        if grad_x is not None:
            grad_x.addmm_(grad_low, a)
        grad_a = grad_low.t() @ rows
        grad_b = low_rank.t() @ grad  # transposed: a product of few rows reads `grad` in its own order
        grads = []
        for number, (ranks, outputs) in enumerate(zip(self._ranks, self._outputs, strict=True)):
            grads.append(torch.empty_like(self.adapters[2 * number]).copy_(grad_a[ranks]))
            grads.append(torch.empty_like(self.adapters[2 * number + 1]).copy_(grad_b[ranks, outputs].t()))
        return grad_x, grads

    def _joined_adapters(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [R, D] and B [O, R] in `dtype`, made again each time, since optimizers change the originals in place."""
        all_a, all_b = self.adapters[::2], self.adapters[1::2]
        if len(self.sizes) == 1:
            return all_a[0].to(dtype), all_b[0].to(dtype)
        b = torch.zeros(sum(self.sizes), self._ranks[-1].stop, dtype=dtype, device=all_b[0].device)
        for part, ranks, outputs in zip(all_b, self._ranks, self._outputs, strict=True):
            b[outputs, ranks] = part
        return torch.cat(all_a).to(dtype), b

    def _scale(self, low_rank: Tensor) -> Tensor:
        if len(set(self._scale_of_rank)) == 1:
            return low_rank.mul_(self._scale_of_rank[0])
        return low_rank.mul_(low_rank.new_tensor(self._scale_of_rank))


def _join_biases(layers: Sequence[FrozenLayer]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    weights = [layer.weight.weights[0] for layer in layers]
    return torch.cat(
        [w.new_zeros(len(w)) if layer.bias is None else layer.bias for layer, w in zip(layers, weights, strict=True)]
    )


class LoraLinear(torch.autograd.Function):
    """A `JoinedLinear` of x [..., D], with its A, B, A, B...: [..., O].

    Products run in `x`'s dtype and accumulate in fp32. The base's weights and biases get no gradient.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, linear: JoinedLinear, *adapters: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, kept = linear.forward(rows)
        context.save_for_backward(*((rows, *kept) if kept else ()))
        context.linear = linear
        # Not as a view: some layers change it in place (Llama 4), which autograd forbids for views made here.
        shaped: Tensor = torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]])
        return shaped

    @staticmethod
    def backward(context: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        rows, *kept = context.saved_tensors or (None,)
        grad = grad_out.reshape(-1, grad_out.shape[-1])
        grad_x, grads = context.linear.backward(grad, rows, kept, needs_x=context.needs_input_grad[0])
        return (None if grad_x is None else grad_x.view(*grad_out.shape[:-1], -1)), None, *grads


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the adapter's weights over a base in `dtype`: fp32, or fp64 over fp64."""
    return torch.promote_types(dtype, torch.float32)


def fuse_linears(network: nn.Module) -> int:
    """Let linear layers of the plain kind run as `LoraLinear`; returns how many do. Names and parameters stay."""
    from peft.tuners.lora.layer import LoraLayer

    inner = {id(layer.base_layer) for layer in network.modules() if isinstance(layer, LoraLayer)}
    fused = 0
    for module in network.modules():
        layer = None if id(module) in inner else FrozenLayer.of(module)
        if layer is not None:
            replace_forward(module, _fused_forward(JoinedLinear([layer]), module.forward))
            fused += 1
    return fused


def _fused_forward(linear: JoinedLinear, library: Any) -> Any:
    def forward(*args: Any, **kwargs: object) -> Tensor:
        if len(args) != 1 or kwargs or not linear.is_active():
            out: Tensor = library(*args, **kwargs)
            return out
        return linear(args[0])

    return forward
