"""What is compared: decoder layers, their direct children, and what follows the layers.

3                  a layer; its own numbers are those of its sums and scales
3.self_attn        a child that is given hidden states [rows, width, D]
norm               after the last layer
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trietune.model.decoder_layers import decoder_layers, decoder_of
from trietune.model.replaced import FORWARD_BEFORE

HALF_PRECISION = (torch.bfloat16, torch.float16)
# Numbers of a layer or child that differ in all layers and say nothing about what it computes.
_NUMBERS_OF_LAYERS = ("layer_idx", "layer_id", "training", FORWARD_BEFORE)


def parts_of(network: object) -> dict[str, nn.Module]:
    """All parts by name, in the order of the layers."""
    parts: dict[str, nn.Module] = {}
    layers = decoder_layers(network)
    for number, layer in enumerate(layers):
        parts[str(number)] = layer
        parts.update({f"{number}.{name}": child for name, child in layer.named_children()})
    inner = {id(module) for module in layers.modules()}
    for module in decoder_of(network).modules():
        children = dict(module.named_children())
        if layers in children.values():
            # Some keep several of one kind in a list, such as Gemma 3n's projections to its streams.
            listed = {
                f"{name}.{number}": child
                for name, several in children.items()
                if isinstance(several, nn.ModuleList) and several is not layers
                for number, child in enumerate(several)
            }
            parts.update(
                {
                    f"end.{name}": child
                    for name, child in {**children, **listed}.items()
                    if id(child) not in inner and not isinstance(child, nn.Embedding | nn.ModuleList)
                }
            )
    return parts


def is_layer(name: str) -> bool:
    return "." not in name


def layer_of(name: str) -> str:
    """The layer that a part belongs to; `end` for what follows them."""
    return name.split(".")[0]


def kinds_of(network: Any, parts: dict[str, nn.Module]) -> dict[str, str]:
    """For each layer the first one that runs the same code in the same way.

    Those have the same classes, the same plain attributes, and equal entries in every list of the configuration that
    has one a layer.
    """
    layers = [name for name in parts if is_layer(name)]
    values = network.config.get_text_config().to_dict().values()
    by_layer = [value for value in values if isinstance(value, list | tuple) and len(value) == len(layers)]
    first: dict[object, str] = {}
    found: dict[str, str] = {}
    for number, name in enumerate(layers):
        modules = [parts[name], *(part for other, part in parts.items() if other.startswith(f"{name}."))]
        kind = (tuple(_attributes(module) for module in modules), tuple(str(value[number]) for value in by_layer))
        found[name] = first.setdefault(kind, name)
    return found


def _attributes(module: nn.Module) -> tuple[object, ...]:
    plain = (
        (name, value)
        for name, value in vars(module).items()
        if (value is None or isinstance(value, bool | int | float | str)) and name not in _NUMBERS_OF_LAYERS
    )
    trained = tuple((name, tuple(p.shape), p.requires_grad) for name, p in module.named_parameters())
    return type(module).__name__, tuple(sorted(plain, key=lambda pair: pair[0])), trained


class InFullPrecision:
    """One part's parameters and buffers in fp32 until `restore`, then the very same tensors again, bit for bit.

    What is packed for the matrix library is left aside meanwhile, what is held in 4 bits is multiplied in fp32, and a
    module that is trained whole does not round its output to the base's dtype.
    """

    def __init__(self, part: nn.Module) -> None:
        tensors: list[Tensor] = [*part.parameters(), *part.buffers()]
        self._kept = [(tensor, tensor.data) for tensor in tensors if tensor.dtype in HALF_PRECISION]
        self._attributes: list[tuple[object, str, object]] = []
        for module in part.modules():
            frozen = vars(module).get("frozen_weight")
            if frozen is not None:
                self._set(frozen, "may_pack", False)
            if vars(module).get("compute_dtype") in HALF_PRECISION:
                self._set(module, "compute_dtype", torch.float32)
            if "narrows_to" in vars(module):
                self._set(module, "narrows_to", torch.float32)
        for tensor, data in self._kept:
            tensor.data = data.float()

    def _set(self, owner: object, name: str, value: object) -> None:
        self._attributes.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def restore(self) -> None:
        for tensor, data in self._kept:
            tensor.data = data
        for owner, name, value in self._attributes:
            setattr(owner, name, value)


def in_full_precision(x: Any) -> Any:
    """Arguments of a part, with every half-precision tensor in fp32."""
    if isinstance(x, Tensor) and x.dtype in HALF_PRECISION:
        return x.float()
    if type(x) in (tuple, list):
        return type(x)(in_full_precision(y) for y in x)
    return {name: in_full_precision(y) for name, y in x.items()} if type(x) is dict else x


@contextmanager
def adapters_that_matter(network: nn.Module) -> Iterator[None]:
    """Tensors that are all zero and trained, as a new adapter's B is, random for the time of a proof.

    With B zero the gradient of A is zero, whatever computes it.
    """
    generator = torch.Generator().manual_seed(0)
    kept: list[tuple[nn.Parameter, Tensor]] = []
    for name, parameter in network.named_parameters():
        if "lora_" in name and parameter.is_floating_point() and not bool(parameter.detach().any()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).mul_(0.05)
            kept.append((parameter, parameter.data))
            parameter.data = noise.to(parameter.device, parameter.dtype)
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
