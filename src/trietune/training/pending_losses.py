"""Losses and gradient norms, from the device to the host when they are asked for.

Reading a number waits until the device has computed it. A device that runs operations one by one waits little, so each
step is read, and a step that is not finite is never applied. One that runs whole steps would stand still; its steps
are read when they are reported, and all that came since are checked then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


class LossNotFiniteError(Exception):
    """The loss or the gradient of a step is NaN or infinite.

    The weights are those of the step before where every step is read, else no longer of use.
    """

    def __init__(self, number: int, loss: float, grad_norm: float, sequence_indices: np.ndarray) -> None:
        super().__init__(f"step {number}: loss {loss}, gradient norm {grad_norm}")
        self.number = number
        self.loss = loss
        self.grad_norm = grad_norm
        self.sequence_indices = sequence_indices


@dataclass(slots=True)
class PendingLosses:
    """What the steps since the last reading left on the device."""

    _waiting: list[tuple[int, Tensor, Tensor, np.ndarray]] = field(default_factory=list)

    def add(self, number: int, loss: Tensor, grad_norm: Tensor, sequence_indices: np.ndarray) -> None:
        """Keep what step `number` computed."""
        self._waiting.append((number, loss, grad_norm, sequence_indices))

    def fetch(self) -> tuple[float, float]:
        """Loss and gradient norm of the last step.

        Raises:
            LossNotFiniteError: for the first step since the last reading of which one is not finite.
        """
        waiting, self._waiting = self._waiting, []
        loss = grad_norm = math.nan
        for number, loss_on_device, norm_on_device, sequence_indices in waiting:
            loss, grad_norm = float(loss_on_device), float(norm_on_device)
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                raise LossNotFiniteError(number, loss, grad_norm, sequence_indices)
        return loss, grad_norm
