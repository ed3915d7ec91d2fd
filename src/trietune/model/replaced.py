"""Forwards that stand in front of transformers' and PEFT's own, and the way back to these.

Only what was put in front by `replace_forward` is ever taken away again: others (accelerate, a user) may do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

FORWARD_BEFORE = "forward_before_trietune"


def replace_forward(module: nn.Module, forward: Callable[..., object]) -> None:
    """Let `module` compute `forward`; what it computed before is kept for `restore_forward`."""
    vars(module).setdefault(FORWARD_BEFORE, vars(module).get("forward"))
    module.forward = forward


def restore_forward(module: nn.Module) -> None:
    """Let `module` compute what it did before the first `replace_forward`; nothing happens if there was none."""
    if FORWARD_BEFORE not in vars(module):
        return
    before = vars(module).pop(FORWARD_BEFORE)
    del module.forward
    if before is not None:
        module.forward = before


@contextmanager
def library_code(network: Any, attention: str) -> Iterator[None]:
    """Every module of `network` computes transformers' and PEFT's own code, with `attention` of transformers."""
    replaced = [(module, module.forward) for module in network.modules() if FORWARD_BEFORE in vars(module)]
    implementation = network.config._attn_implementation
    for module, _ in replaced:
        restore_forward(module)
    network.set_attn_implementation(attention)
    try:
        yield
    finally:
        network.set_attn_implementation(implementation)
        for module, forward in replaced:
            replace_forward(module, forward)
