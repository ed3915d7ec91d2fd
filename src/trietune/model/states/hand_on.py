"""Let the layers of a network that carry a state compute nodes of a trie, or rows that decode.

A mixer is a module whose own forward calls functions of `kinds` by name. Its code stays transformers': it runs with
other functions under these names, which read from the carrier of the call what follows what. The names are bound for
that call alone, so neither transformers nor another model notices.

    decoder layer, called with `trie_layout` or `attends` -> its mixers -> (carrier of that) -> kinds
    called without                                        -> transformers' own code

The layer hands the carrier to its mixers, whatever it hands on itself, and so it does when it is computed a second time
in the backward (checkpointing).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import nn

from trietune.model.decoder_layers import decoder_layers
from trietune.model.replaced import FORWARD_BEFORE, replace_forward
from trietune.model.states.kinds import Carrier, Function, Kind, Place, is_scan, kind_of

# What a decoder layer is told: by `TrieModel`, by `evaluation.decoding`.
_TOLD_BY = ("trie_layout", "attends")


class _Bound:
    """The carrier of the call that a decoder layer is in; None outside and for plain rows."""

    __slots__ = ("carrier",)

    def __init__(self) -> None:
        self.carrier: Carrier | None = None


def carries_states(network: object) -> bool:
    """Whether some layer has a mixer."""
    return bool(mixers_in(decoder_layers(network)))


def carry_states(network: object, only: nn.Module | None = None) -> int:
    """Install this in all decoder layers of `network`, or in the layer `only`; says how many mixers there are.

    Layers that have it already are left alone.
    """
    number = 0
    for index, layer in enumerate(decoder_layers(network)):
        if only is not None and layer is not only:
            continue
        mixers = [(module, _kinds_in(module)) for module in mixers_in(layer)]
        number += len(mixers)
        if not mixers or any(FORWARD_BEFORE in vars(module) for module, _ in mixers):
            continue
        bound = _Bound()
        for place, (mixer, kinds) in enumerate(mixers):
            replace_forward(mixer, _mixer_forward(mixer, kinds, bound, (index, place)))
        replace_forward(layer, _layer_forward(layer, bound))
    return number


def scans_states(part: nn.Module) -> bool:
    """Whether some module of a part carries a state of any length, and not only a window."""
    return any(is_scan(kind) for mixer in mixers_in(part) for kind in _kinds_in(mixer).values())


def mixers_in(layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer that mix positions by functions of `kinds`."""
    return [module for module in layer.modules() if _kinds_in(module)]


def _kinds_in(module: nn.Module) -> dict[str, Kind]:
    """The functions of `kinds` that a module's own forward calls, by name."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    names = inspect.unwrap(type(module).forward).__globals__ if code is not None else {}
    found: dict[str, Kind] = {}
    for name in code.co_names if code is not None else ():
        function = names.get(name)
        kind = kind_of(function) if isinstance(function, FunctionType) else None
        if kind is not None:
            found[name] = kind
    return found


def _layer_forward(layer: nn.Module, bound: _Bound) -> Callable[..., object]:
    own = layer.forward

    def forward(*args: object, **kwargs: Any) -> object:
        before = bound.carrier
        told = next((kwargs[name] for name in _TOLD_BY if kwargs.get(name) is not None), None)
        bound.carrier = None if told is None else told.carrier
        try:
            return own(*args, **kwargs)
        finally:
            bound.carrier = before

    return forward


def _mixer_forward(
    mixer: nn.Module, kinds: dict[str, Kind], bound: _Bound, number: tuple[int, int]
) -> Callable[..., object]:
    own = mixer.forward
    plain = inspect.unwrap(type(mixer).forward)

    def forward(*args: object, **kwargs: object) -> object:
        carrier = bound.carrier
        if carrier is None:
            return own(*args, **kwargs)
        calls = 0

        def standing_for(function: Function, kind: Kind) -> Function:
            def call(*inner: object, **how: object) -> object:
                nonlocal calls
                calls += 1
                return kind(function, carrier, Place(*number, calls))(*inner, **how)

            return call

        names = plain.__globals__
        functions = {name: standing_for(names[name], kind) for name, kind in kinds.items()}
        with_carrier = FunctionType(
            plain.__code__, {**names, **functions}, plain.__name__, plain.__defaults__, plain.__closure__
        )
        with_carrier.__kwdefaults__ = plain.__kwdefaults__
        return with_carrier(mixer, *args, **kwargs)

    return forward
