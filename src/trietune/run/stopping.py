"""When a run stops before its last step: a signal, or `max_time`."""

from __future__ import annotations

import time
from dataclasses import dataclass

from trietune.errors import EXIT_DONE, StopRequested
from trietune.run.signals import StopSignals

# `max_time` leaves this many steps' time, and this many seconds, to save in.
STEPS_LEFT_TO_SAVE, SECONDS_LEFT_TO_SAVE = 1.5, 2.0
# Launchers kill 10 to 30 seconds after a signal; copies that are not through by then are left to `trietune sync`.
SECONDS_TO_COPY_AFTER_SIGNAL = 6.0


@dataclass(frozen=True, slots=True)
class TimedStop:
    """A stop by signal, or because `max_time` is nearly over.

    Attributes:
        max_time: seconds from `began`; None: no limit.
        began: when the command began, by `time.monotonic`.
    """

    signals: StopSignals
    max_time: float | None
    began: float

    def check(self) -> None:
        """Raise `StopRequested` if it is time to leave; for long work between steps."""
        self.check_step(0.0)

    def check_step(self, slowest_step: float) -> None:
        """Raise `StopRequested` after a signal, or if there may be no time for one more step, in seconds."""
        self.signals.check()
        if self.max_time is None:
            return
        left = self.max_time - self.seconds
        if left < STEPS_LEFT_TO_SAVE * slowest_step + SECONDS_LEFT_TO_SAVE:
            raise StopRequested("max_time", EXIT_DONE)

    @property
    def seconds(self) -> float:
        """Since the command began."""
        return time.monotonic() - self.began

    def must_leave(self) -> bool:
        """Whether the wait for uploads should end: a signal has come and its grace is nearly over."""
        came = self.signals.received_at
        return came is not None and time.monotonic() - came > SECONDS_TO_COPY_AFTER_SIGNAL
