"""The gradients of a step, micro-batch by micro-batch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from trietune.device.memory import is_out_of_memory, release_cached_memory
from trietune.model.causal_lm import TrieModel
from trietune.training.loss_scale import LossScale
from trietune.trie import MicroBatch, total_weight

R = TypeVar("R")


class MicroBatchTooLargeError(Exception):
    """Memory ran out in a micro-batch; the weights are those of the step before.

    Attributes:
        num_positions: positions in that micro-batch.
        longest: positions of its longest sequence, below which no cut can go.
    """

    def __init__(self, num_positions: int, longest: int) -> None:
        super().__init__(f"no memory for {num_positions} positions, {longest} of them of one sequence")
        self.num_positions = num_positions
        self.longest = longest


class TooLargeElsewhereError(Exception):
    """Memory ran out in another of the processes that share the step; here nothing more is to be computed of it."""


def accumulate_gradients(
    model: TrieModel,
    micro_batches: Sequence[MicroBatch],
    between: Callable[[], None] = lambda: None,
    loss_scale: LossScale | None = None,
    divisor: float | None = None,
) -> Tensor:
    """Add the gradients of the mean loss over all labels of `micro_batches`; returns that loss, still on the device.

    Args:
        divisor: what the weighted sum of the labels' losses is divided by; by default the sum of the weights.
        between: called after each micro-batch but the last, which goes together with the update.
        loss_scale: scale of the gradients.

    Raises:
        MicroBatchTooLargeError: memory ran out; some gradients may have been added.
    """
    if divisor is None:
        divisor = total_weight(micro_batches)
    # A tensor of one element from the host is data; a number would be a part of the program.
    loss = model.to_device(torch.zeros(1))[0]
    for micro_batch in micro_batches:
        if micro_batch is not micro_batches[0]:
            between()
        loss = loss + _backward(model, micro_batch, divisor, loss_scale)
    return loss


def if_memory_suffices(compute: Callable[[], R], micro_batch: MicroBatch) -> R:
    """`compute()`, which is the work on `micro_batch`.

    Raises:
        MicroBatchTooLargeError: memory ran out.
    """
    try:
        return compute()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Only here has the error gone, and with it the frames that held the activations.
    gc.collect()
    release_cached_memory()
    raise MicroBatchTooLargeError(micro_batch.num_positions, int(micro_batch.position_ids.max()) + 1)


def _backward(model: TrieModel, micro_batch: MicroBatch, divisor: float, loss_scale: LossScale | None) -> Tensor:
    return if_memory_suffices(lambda: _add_gradients(model, micro_batch, divisor, loss_scale), micro_batch)


def _add_gradients(model: TrieModel, micro_batch: MicroBatch, divisor: float, loss_scale: LossScale | None) -> Tensor:
    losses = model.label_losses(micro_batch)
    weight = model.to_device(torch.from_numpy(micro_batch.label_weight / divisor).to(losses.dtype))
    part = torch.dot(losses, weight)
    to_differentiate = part if loss_scale is None else loss_scale.multiply(part)
    to_differentiate.backward()  # type: ignore[no-untyped-call]
    return part.detach()
