"""The final adapter has the best checkpoint's weights, while training keeps those of its last step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trietune.model.adapter.adapter import adapter_tensors, overwrite_tensors, set_adapter_tensors

if TYPE_CHECKING:
    from peft import PeftModel


@contextmanager
def best_weights(peft_model: PeftModel, step: int, better: tuple[int, bytes] | None) -> Iterator[int]:
    """Put better weights into the model; gives the step that the model's weights are of.

    However the block ends, the last step's weights are back by then: a stop saves them under the last step's name.

    Args:
        step: the last one, whose weights are in the model.
        better: step and weights of a checkpoint that was measured better; None if none was.
    """
    if better is None:
        yield step
        return
    best_step, weights = better
    live = adapter_tensors(peft_model)
    last = {name: tensor.detach().to("cpu", copy=True) for name, tensor in live.items()}
    try:
        set_adapter_tensors(peft_model, weights, where=f"step {best_step}")
        yield best_step
    finally:
        overwrite_tensors(live, last)
