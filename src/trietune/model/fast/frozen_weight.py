"""The weight of a linear layer that is frozen, ready to be multiplied from both sides.

    forward   x [T, in] -> x W' [T, out]        backward   g [T, out] -> g W [T, in]

A matrix library blocks a weight for its registers and caches at every product. A weight that stays the same can be
blocked once and kept so, as oneDNN does for inference; here for both directions. On CPU that makes products of many
rows faster by 15%, of few rows by half, in fp32 on some processors by more than twice (`benchmarks/products.py`). It
costs memory: a second and a third copy of the weight.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

# A context for a module, in which all of its weights are in this process.
Whole = Callable[[nn.Module], AbstractContextManager[object]]

PACKED_DTYPES = (torch.bfloat16, torch.float32)


class FrozenWeight:
    """Weights [out, in] of linear layers with one input, as one under each other, and, if they may be made, its
    blocked copies.

    A layer's weight is looked up at each use, since what shards a network replaces it. Each copy is made when it is
    first multiplied with. Weights that are changed afterwards (a merged adapter, a loaded state) or replaced are
    multiplied as they are.

    Attributes:
        modules: the linear layers.
        may_pack: whether copies may be made.
        is_part: whether it is part of another one, which is multiplied in its place.
    """

    def __init__(self, *modules: nn.Linear) -> None:
        self.modules = modules
        self.may_pack = False
        self.is_part = False
        self._forward: Tensor | None = None
        self._backward: Tensor | None = None
        # Without keeping alive a weight that has been replaced.
        self._originals = [(weakref.ref(weight), weight._version) for weight in self.weights]
        self._ends = list(itertools.accumulate(len(weight) for weight in self.weights))

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """As they are now."""
        return tuple(module.weight for module in self.modules)

    @property
    def numel(self) -> int:
        return sum(weight.numel() for weight in self.weights)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[0].dtype

    def forward(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """`rows` [T, in] times W', plus the bias: [T, out]."""
        if self._packs(rows):
            if self._forward is None:
                self._forward = _blocked(self._joined())
            return _product(rows, self._forward, bias)
        if len(self.modules) == 1:
            return nn.functional.linear(rows, self.modules[0].weight, bias)
        out = rows.new_empty(len(rows), self._ends[-1])
        for weight, columns in zip(self.weights, self._columns(out), strict=True):
            torch.mm(rows, weight.t(), out=columns)
        return out if bias is None else out.add_(bias)

    def backward(self, grad: Tensor) -> Tensor:
        """`grad` [T, out] times W: [T, in]."""
        if self._packs(grad):
            if self._backward is None:
                self._backward = _blocked(self._joined().t())
            return _product(grad, self._backward, None)
        if len(self.modules) == 1:
            return grad @ self.modules[0].weight
        first, *others = zip(self._columns(grad), self.weights, strict=True)
        total = first[0] @ first[1]
        for columns, weight in others:
            total.addmm_(columns, weight)
        return total

    def _joined(self) -> Tensor:
        weights = [weight.detach() for weight in self.weights]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def _columns(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.tensor_split(self._ends[:-1], 1)

    def _packs(self, operand: Tensor) -> bool:
        return (
            self.may_pack
            and operand.dtype == self.dtype
            and all(
                original() is weight and weight._version == version
                for weight, (original, version) in zip(self.weights, self._originals, strict=True)
            )
        )


def _blocked(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return packed


def _product(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), packed, bias, "none", [], "")
    return out


def frozen_weight(module: nn.Linear) -> FrozenWeight:
    """The one `FrozenWeight` of a linear layer, made when it is first asked for."""
    known: FrozenWeight | None = module.__dict__.get("frozen_weight")
    if known is None:
        known = module.__dict__["frozen_weight"] = FrozenWeight(module)
    return known


def keep_joined(module: nn.Module, joined: FrozenWeight, *, instead_of: Sequence[FrozenWeight] = ()) -> None:
    """Let `joined` be packed with the weights of `module`, and the weights that it stands for not."""
    module.__dict__["frozen_weight"] = joined
    for part in instead_of:
        part.is_part = True


def pack_frozen_weights(network: nn.Module, *, most_bytes: int | None = None) -> int:
    """Let frozen weights of `network` be packed, layer after layer, while all copies take at most `most_bytes`.

    Returns what the copies will take; the same bound chooses the same weights, and what a choice takes, as a bound,
    chooses them again. Nothing is packed where the matrix library has no such products: off the CPU, or
    in another dtype.
    """
    found = (module.__dict__.get("frozen_weight") for module in network.modules())
    total = 0
    for frozen in found:
        if not isinstance(frozen, FrozenWeight) or frozen.is_part or not can_pack(frozen.weights[0]):
            continue
        num_bytes = 2 * frozen.numel * frozen.weights[0].element_size()
        frozen.may_pack = most_bytes is None or total + num_bytes <= most_bytes
        total += num_bytes if frozen.may_pack else 0
    return total


def can_pack(weight: Tensor) -> bool:
    """Whether this machine has products of blocked copies of such a weight."""
    is_built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not is_built or weight.device.type != "cpu" or weight.dtype not in PACKED_DTYPES:
        return False
    # Processors without AVX-512 (BW, VL, DQ) have no blocked products in bf16: oneDNN refuses them with a RuntimeError.
    return weight.dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
