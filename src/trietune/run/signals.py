"""Signals end a run at the next point where it is safe, with the work saved.

A handler only takes a note. Long work (steps, evaluation, tokenizing, uploads) asks `check` at short intervals, which
raises `StopRequested`. A second signal leaves at once: whatever is being written is staged, so nothing is harmed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from trietune.errors import StopRequested

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Handles SIGINT, SIGTERM and SIGUSR1 while it is open; the handlers of before are put back.

    Outside the main thread (a notebook's worker, say) no handler can be set, and signals keep their old meaning.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.received_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def check(self) -> None:
        """Raise `StopRequested` if a signal has come."""
        if self.received is not None:
            raise StopRequested(self.received.name, 128 + self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        self.received_at = time.monotonic()
