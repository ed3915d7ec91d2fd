"""What the loop gives to whatever learns from a step, and what it gets back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from trietune.device.device import Device
from trietune.model.causal_lm import TrieModel
from trietune.ranks.ranks import ALONE, Ranks
from trietune.training.loss_scale import LossScale
from trietune.trie import MicroBatch


@dataclass(frozen=True, slots=True)
class Work:
    """A step before its gradients are there.

    Attributes:
        rows: rows of the data, in the order drawn; int64 [rows of the step].
        micro_batches: micro-batches that hold their sequences.
        reseed: begins the step's random draws (dropout) again.
        loss_scale: scale of the gradients; None leaves them as they are.
        divisor: labels of the whole step, where other processes hold the rest of it; None: those of `micro_batches`.
        fillers: micro-batches whose labels weigh nothing, computed after the others so that all processes compute as
            many.
        ranks: the processes that share the step.
        filler: one such micro-batch, for whoever computes another number of passes than one for each micro-batch.
    """

    rows: np.ndarray
    micro_batches: Sequence[MicroBatch]
    device: Device
    reseed: Callable[[], None]
    loss_scale: LossScale | None
    divisor: float | None = None
    fillers: Sequence[MicroBatch] = ()
    ranks: Ranks = ALONE
    filler: MicroBatch | None = None


@dataclass(frozen=True, slots=True)
class Learnt:
    """The loss of a step, on any device, and other numbers about it; the gradients are with the parameters."""

    loss: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)


# Adds the gradients of a step. Raises `MicroBatchTooLargeError` when memory runs out.
Learn = Callable[[TrieModel, Work], Learnt]
