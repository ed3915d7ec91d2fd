"""Hand each event of a run to everything that shows or keeps it, so that none of them can stop the run.

    loop, evaluation, checkpoints  --event-->  Tracker  -->  files, W&B, report, console

A listener that raises is dropped: one warning to the others, and the run continues. One that raises `StillTrying` has
kept what it could not deliver (the files of a run, while the disk is full): it stays, is told once, and tries again
at the next event.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from trietune.tracking.events import Event, Listener, Message

logger = logging.getLogger(__name__)


class StillTrying(Exception):  # noqa: N818  (a state, not a failure)
    """Raised by a listener that could not deliver, has lost nothing, and will try again at the next event."""


class Tracker:
    """The listeners of one run. Any thread may emit; listeners see one event at a time."""

    def __init__(self, listeners: Iterable[Listener] = ()) -> None:
        self._listeners = list(listeners)
        self._troubled: set[int] = set()
        # Reentrant: a listener's trouble is itself an event.
        self._lock = threading.RLock()

    def add(self, listener: Listener) -> None:
        """Let one more listener see the events from now on."""
        self._listeners.append(listener)

    def emit(self, event: Event) -> None:
        """Hand `event` to every listener, in the order in which they were given. Raises nothing of theirs."""
        with self._lock:
            self._hand_round(event)

    def info(self, text: str) -> None:
        """Emit one line for the user."""
        self.emit(Message(text, level="info"))

    def warn(self, text: str) -> None:
        """Emit one line that the user should not miss."""
        self.emit(Message(text, level="warning"))

    def close(self) -> None:
        """Close every listener; the last one is normally the console, so that it hears of the others' troubles."""
        with self._lock:
            while self._listeners:
                listener = self._listeners.pop(0)
                try:
                    listener.close()
                except Exception as error:
                    logger.debug("closing %s failed", listener.name, exc_info=True)
                    self.warn(f"{listener.name}: could not be closed: {_describe(error)}")

    def _hand_round(self, event: Event) -> None:
        for listener in list(self._listeners):
            if listener not in self._listeners:
                continue  # dropped meanwhile, while another listener's warning was handed round
            try:
                listener.handle(event)
            except StillTrying as trouble:
                self._report_trouble(listener, trouble)
            except Exception as error:  # whatever a tracker does, training continues
                self._drop(listener, error)
            else:
                self._troubled.discard(id(listener))

    def _report_trouble(self, listener: Listener, trouble: StillTrying) -> None:
        if id(listener) in self._troubled:
            return
        self._troubled.add(id(listener))
        self.warn(f"{listener.name}: {trouble}; will be tried again at the next event")

    def _drop(self, listener: Listener, error: Exception) -> None:
        logger.debug("%s failed", listener.name, exc_info=True)
        self._listeners.remove(listener)
        try:
            listener.close()
        except Exception:
            logger.debug("closing %s failed too", listener.name, exc_info=True)
        self.warn(f"{listener.name}: {_describe(error)}; the run continues without it")


def _describe(error: Exception) -> str:
    """One line, whatever the exception's text looks like."""
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}" if text else repr(error)
