"""Training in fp16: the loss is multiplied before the backward pass, so that small gradients do not underflow.

    loss x scale -> backward in fp16 -> gradients / scale, in fp32 -> clip -> update
                                        | some are infinite: the scale was too large
                                        v
                                        half the scale, and the same step again

Only an update whose gradients are finite is taken, so a step is never skipped: what training sees, and when, does not
depend on the scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# A scale below which gradients are not too large for fp16, but infinite in themselves.
SMALLEST_SCALE = 1.0


class LossScale:
    """The scale of a run; holds it over steps.

    Args:
        device: device of the gradients.
        state: state of an earlier one, to continue from.
    """

    def __init__(self, device: torch.device, state: Mapping[str, Any] | None = None) -> None:
        self._scaler = torch.amp.GradScaler(device.type)
        if state is not None:
            self._scaler.load_state_dict(dict(state))

    def state(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return dict(self._scaler.state_dict())

    def multiply(self, loss: Tensor) -> Tensor:
        """The loss whose gradients are `scale` times too large."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def divide_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the gradients those of the loss itself; once for each step."""
        self._scaler.unscale_(optimizer)

    def has_overflowed(self, loss: Tensor, grad_norm: Tensor) -> bool:
        """Whether the gradients are infinite only because of the scale, not for the loss or what it is made of."""
        is_too_large = math.isfinite(float(loss)) and not math.isfinite(float(grad_norm))
        return is_too_large and self._scaler.get_scale() > SMALLEST_SCALE

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimizer's step if its gradients are finite, and make the scale larger or smaller after it."""
        self._scaler.step(optimizer)
        self._scaler.update()
