"""The functions that mix positions in layers with a state, known by the arguments that they take.

    window        a causal depthwise convolution of a few positions
    delta rule    a state [H, K, V] that decays, and is corrected towards a value (Gated DeltaNet, Kimi)
    Mamba 2       a state [H, P, S] with one decay a head
    Mamba 1       a state [D, S] with a decay for each of its numbers
    shortcut      convolution, scan, norm and output in one kernel, for plain rows; None makes a layer take its parts

transformers' function computes each segment. A *carrier* says which positions follow each other: nodes of a trie, or
rows that decode. What is padded is all zeros, and a step of zeros must leave the state as it is.

Letters: T nodes; N segments of L steps, or N rows; D channels; H heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# Chunks of a scan change only its rounding. In a longer chunk a short segment pays for steps that it has not, and in
# shorter ones a scan in plain PyTorch takes more time a step.
SHORTEST_CHUNK, LONGEST_CHUNK = 16, 64


@dataclass(frozen=True, slots=True)
class Place:
    """Which call of a network this is: numbers of the layer, of the mixer in it, and of the call in its forward."""

    layer: int
    mixer: int
    call: int


class Run(Protocol):
    def __call__(self, inputs: list[Tensor], start: Tensor | None, wants_state: bool, /) -> tuple[Tensor, Any]:
        """Scan inputs [N, L, ...] from states [N, ...], or from zero.

        Returns:
            Outputs [N, L, ...], and the states after the last step, or None if they are not wanted.
        """


class Carrier(Protocol):
    """Which positions follow each other. Inputs and outputs are those of transformers' layers: one row of positions."""

    def window(self, place: Place, x: Tensor, width: int, run: Callable[[Tensor], Tensor]) -> Tensor:
        """A causal window over x [1, D, T]; `run` computes rows [N, D, L]."""

    def scan(self, place: Place, inputs: list[Tensor], run: Run) -> Tensor:
        """A scan over inputs [1, T, ...], the first of which has the shape of the outputs."""


Function = Callable[..., Any]
# (transformers' function, carrier, place) -> what stands for it
Kind = Callable[[Function, Carrier, Place], Function]


def kind_of(function: Function) -> Kind | None:
    """How a function of a modelling file is computed on a trie; None if it is none of these."""
    try:
        names = set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    for needed, refused, kind in _KINDS:
        if needed <= names and not refused & names:
            return kind
    return None


def is_scan(kind: Kind) -> bool:
    """Whether a function of this kind carries a state, which a window does not."""
    return kind not in (_window, _shortcut)


def chunk_for(length: int, default: int) -> int:
    """The chunk in which a segment of `length` steps is scanned."""
    fitting = 1 << (length - 1).bit_length()
    return min(default, max(SHORTEST_CHUNK, min(fitting, LONGEST_CHUNK)))


def _window(library: Function, carrier: Carrier, place: Place) -> Function:
    def causal_conv1d_fn(
        hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: object
    ) -> Tensor:
        def run(rows: Tensor) -> Tensor:
            out: Tensor = library(rows, weight, bias, activation=activation)
            return out

        return carrier.window(place, hidden_states, weight.shape[-1], run)

    return causal_conv1d_fn


def _delta_rule(library: Function, carrier: Carrier, place: Place) -> Function:
    """Zeros are neutral: a decay of exp(0) keeps the state, and a beta of 0 writes nothing."""

    def chunk_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = LONGEST_CHUNK,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **_: object,
    ) -> tuple[Tensor, None]:
        def run(inputs: list[Tensor], start: Tensor | None, wants_state: bool) -> tuple[Tensor, object]:
            v, q, k, decay, b = inputs
            found: tuple[Tensor, object] = library(
                q,
                k,
                v,
                g=decay,
                beta=b,
                chunk_size=chunk_for(v.shape[1], chunk_size),
                initial_state=start,
                output_final_state=wants_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            )
            return found

        return carrier.scan(place, [value, query, key, g, beta], run), None

    return chunk_delta_rule


def _mamba2(library: Function, carrier: Carrier, place: Place) -> Function:
    """Zeros are neutral once dt is what the scan sees: after bias, softplus and limits, taken at the nodes."""

    def chunk_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        **_: object,
    ) -> Tensor:
        steps = _time_steps(dt, dt_bias, is_softplus=dt_softplus).clamp(*dt_limit)

        def run(inputs: list[Tensor], start: Tensor | None, wants_state: bool) -> tuple[Tensor, object]:
            x, time, b, c = inputs
            out = library(
                x,
                time,
                A,
                b,
                c,
                chunk_size=chunk_for(x.shape[1], chunk_size),
                D=D,
                initial_states=start,
                return_final_states=wants_state,
            )
            return out if wants_state else (out, None)

        out = carrier.scan(place, [hidden_states, steps, B, C], run)
        return out if z is None else out * torch.nn.functional.silu(z)

    return chunk_scan


def _mamba1(library: Function, carrier: Carrier, place: Place) -> Function:
    """Zeros are neutral as in Mamba 2. transformers' scan takes no initial state, but the state is linear in it.

    h_t = exp(A * (dt_1 + ... + dt_t)) h_0 + (the scan from zero)_t, so C_t h_0 with that factor is put on top.
    """

    def selective_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **how: object,
    ) -> Tensor:
        bias = None if delta_bias is None else delta_bias[..., None]
        steps = _time_steps(dt, bias, is_softplus=delta_softplus)

        def run(inputs: list[Tensor], start: Tensor | None, wants_state: bool) -> tuple[Tensor, object]:
            u, time, b, c = (x.transpose(1, 2) for x in inputs)  # positions last
            found = library(u, time, A, b, c, D=D, return_last_state=wants_state, **how)
            out, state = found if wants_state else (found, None)
            if start is not None:
                kept = (
                    torch.exp(A[:, None] * time.to(start.dtype).cumsum(2)[..., None]) * start[:, :, None]
                )  # [N,D,L,S]
                out = out + torch.einsum("ndls,nsl->ndl", kept, c.to(kept.dtype)).to(out.dtype)
                state = None if state is None else state + kept[:, :, -1]
            return out.transpose(1, 2), state

        out = carrier.scan(place, [x.transpose(1, 2) for x in (hidden_states, steps, B, C)], run).transpose(1, 2)
        return out if z is None else out * torch.nn.functional.silu(z)

    return selective_scan


def _time_steps(dt: Tensor, bias: Tensor | None, *, is_softplus: bool) -> Tensor:
    """What a Mamba scan makes of `dt` before it uses it, in the dtype in which transformers does."""
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    return torch.nn.functional.softplus(dt) if is_softplus else dt


def _shortcut(library: Function, carrier: Carrier, place: Place) -> Function:
    return lambda *args, **kwargs: None


# Arguments that a function takes, and others that it must not.
_KINDS: tuple[tuple[set[str], set[str], Kind], ...] = (
    ({"conv1d_weight", "conv1d_bias", "A"}, set(), _shortcut),
    ({"hidden_states", "weight", "bias", "activation"}, {"conv_state", "cache"}, _window),
    (
        {"query", "key", "value", "g", "beta", "chunk_size", "initial_state", "output_final_state"},
        set(),
        _delta_rule,
    ),
    ({"dt", "A", "B", "C", "chunk_size", "initial_states", "return_final_states", "dt_limit"}, set(), _mamba2),
    ({"dt", "A", "B", "C", "delta_bias", "delta_softplus", "return_last_state"}, {"state"}, _mamba1),
)
