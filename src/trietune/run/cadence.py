"""How often something is due: what is logged, validated, saved, and therefore read from the device.

steps_freq 10, val_steps_freq 50    logged 1, 10, 20 ...    validated 50, 100 ...    and the last step in any case
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trietune.config.settings import Settings
    from trietune.run.plan import Plan


@dataclass(frozen=True, slots=True)
class Cadence:
    """What is due after step `number`, counted from 1."""

    settings: Settings
    plan: Plan

    def is_logged(self, number: int) -> bool:
        return number % self.settings.steps_freq == 0 or number in (1, self.plan.num_steps)

    def is_validated(self, number: int) -> bool:
        """Apart from steps that are saved, which are measured too."""
        return self.settings.is_validation_due(number)

    def is_saved(self, number: int, *, is_last: bool) -> bool:
        match self.settings.save_strategy:
            case "step":
                return number % self.settings.steps_freq == 0
            case "epoch":
                epoch, steps_beyond = divmod(number, self.plan.steps_per_epoch)
                return (steps_beyond == 0 and epoch % self.settings.epoch_freq == 0) or is_last
            case _:
                return False

    def is_read(self, number: int) -> bool:
        """Whether anybody asks for the loss of step `number`, or acts on it."""
        is_last = number == self.plan.num_steps
        return self.is_logged(number) or self.is_validated(number) or self.is_saved(number, is_last=is_last)
