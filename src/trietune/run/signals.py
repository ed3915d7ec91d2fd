"""Signals end a run at the next point where it is safe, with the work saved.

A handler only takes a note. Long work (steps, evaluation, tokenizing, uploads) asks `check` at short intervals, which
raises `StopRequested`. A second signal of a person leaves at once: whatever is being written is staged, so nothing is
harmed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from trietune.errors import StopRequested

# Sent by a person or a scheduler; a second one means it.
URGENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Sent by machines, and more than once: a closing terminal hangs up twice, the kernel repeats XCPU every second, systemd
# sends HUP right after TERM. One more says nothing new. (macOS has no PWR.)
REPEATED = tuple(signal.Signals[name] for name in ("SIGHUP", "SIGXCPU", "SIGPWR") if name in signal.Signals.__members__)
STOPPING = (*URGENT, *REPEATED)


class StopSignals:
    """Handles the signals of `STOPPING` while it is open; the handlers of before are put back.

    One that is ignored stays ignored, as `nohup` wants it of HUP. QUIT leaves at once, as the system has it. Outside
    the main thread (a notebook's worker, say) no handler can be set, and signals keep their old meaning.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.received_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: a handler that Python could not put back
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
            if number in REPEATED:
                return
            if number == signal.SIGINT and is_interactive():
                raise KeyboardInterrupt  # a notebook's kernel must live on
            os._exit(128 + number)
        self.received = signal.Signals(number)
        self.received_at = time.monotonic()


def is_interactive() -> bool:
    """Whether a person waits for the next prompt: a notebook, IPython, or Python's own prompt."""
    ipython: Any = sys.modules.get("IPython")
    return hasattr(sys, "ps1") or (ipython is not None and ipython.get_ipython() is not None)


def process_age_s() -> float:
    """Seconds since this process was started, imports included; 0 where the system does not say."""
    try:
        # The 22nd field, counted after the name, which may hold blanks: ticks from boot to start.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
