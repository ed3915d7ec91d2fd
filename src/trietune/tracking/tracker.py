"""Hand each event of a run to everything that shows or keeps it, so that none of them can stop the run.

    loop, evaluation, checkpoints  --event-->  Tracker  -->  files, W&B, report, console

A consumer that raises is dropped: one warning to the others, and the run goes on. One that raises `StillTrying` has
kept what it could not deliver (the files of a run, while the disk is full): it stays, is told once, and tries again
at the next event.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from trietune.tracking.events import Consumer, Event, Said

logger = logging.getLogger(__name__)


class StillTrying(Exception):  # noqa: N818  (a state, not a failure)
    """Raised by a consumer that could not deliver, has lost nothing, and will try again at the next event."""


class Tracker:
    """The consumers of one run. Any thread may emit; consumers see one event at a time."""

    def __init__(self, consumers: Iterable[Consumer] = ()) -> None:
        self._consumers = list(consumers)
        self._troubled: set[int] = set()
        # Reentrant: a consumer's trouble is itself an event.
        self._lock = threading.RLock()

    def add(self, consumer: Consumer) -> None:
        """Let one more consumer see the events from now on."""
        self._consumers.append(consumer)

    def emit(self, event: Event) -> None:
        """Hand `event` to every consumer, in the order in which they were given. Raises nothing of theirs."""
        with self._lock:
            self._hand_round(event)

    def say(self, text: str, *, is_warning: bool = False) -> None:
        """Emit one line for the user."""
        self.emit(Said(text, level="warning" if is_warning else "info"))

    def close(self) -> None:
        """Close every consumer; the last one is normally the console, so that it hears of the others' troubles."""
        with self._lock:
            while self._consumers:
                consumer = self._consumers.pop(0)
                try:
                    consumer.close()
                except Exception as error:
                    logger.debug("closing %s failed", consumer.name, exc_info=True)
                    self.say(f"{consumer.name}: could not be closed: {_describe(error)}", is_warning=True)

    def _hand_round(self, event: Event) -> None:
        for consumer in list(self._consumers):
            if consumer not in self._consumers:
                continue  # dropped meanwhile, while another consumer's warning was handed round
            try:
                consumer.handle(event)
            except StillTrying as trouble:
                self._report_trouble(consumer, trouble)
            except Exception as error:  # whatever a tracker does, training goes on
                self._drop(consumer, error)
            else:
                self._troubled.discard(id(consumer))

    def _report_trouble(self, consumer: Consumer, trouble: StillTrying) -> None:
        if id(consumer) in self._troubled:
            return
        self._troubled.add(id(consumer))
        self.say(f"{consumer.name}: {trouble}; tried again at the next event", is_warning=True)

    def _drop(self, consumer: Consumer, error: Exception) -> None:
        logger.debug("%s failed", consumer.name, exc_info=True)
        self._consumers.remove(consumer)
        try:
            consumer.close()
        except Exception:
            logger.debug("closing %s failed too", consumer.name, exc_info=True)
        self.say(f"{consumer.name}: {_describe(error)}; the run goes on without it", is_warning=True)


def _describe(error: Exception) -> str:
    """One line, whatever the exception's text looks like."""
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}" if text else repr(error)
