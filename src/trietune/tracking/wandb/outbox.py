"""Messages on their way to a slow receiver: bounded, never blocking the sender, and open about what was dropped."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from trietune.tracking.events import Histograms

MOST_MESSAGES = 100_000
MOST_HISTOGRAMS = 2
NUM_BINS = 64


class Outbox:
    """Messages on their way to W&B; bounded, and open about what it had to drop."""

    def __init__(self, most_messages: int = MOST_MESSAGES, most_histograms: int = MOST_HISTOGRAMS) -> None:
        self._messages: deque[dict[str, Any] | Histograms] = deque()
        self._most_messages = most_messages
        self._most_histograms = most_histograms
        self._changed = threading.Condition()
        self._is_discarding = False
        self.is_closed = False
        self.is_begun = False
        self.num_dropped_histograms = 0
        self.num_dropped_messages = 0

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: dict[str, Any]) -> None:
        """Queue a message; a full outbox gives up its histograms, then its oldest message."""
        with self._changed:
            if self._is_discarding:
                return
            if len(self._messages) >= self._most_messages:
                self._make_room()
            self._messages.append(message)
            self._changed.notify()

    def put_histograms(self, event: Histograms) -> None:
        """Queue histograms, unless some are waiting already: they are large, and a later one says more."""
        with self._changed:
            if self._is_discarding:
                return
            num_waiting = sum(isinstance(message, Histograms) for message in self._messages)
            if num_waiting >= self._most_histograms or len(self._messages) >= self._most_messages:
                self.num_dropped_histograms += 1
                return
            self._messages.append(event)
            self._changed.notify()

    def take(self) -> dict[str, Any] | None:
        """The next message, waiting for it; None when the outbox is closed and empty."""
        with self._changed:
            while not self._messages and not self.is_closed:
                self._changed.wait()
            if not self._messages:
                return None
            self.is_begun = True
            message = self._messages.popleft()
        return histograms_message(message) if isinstance(message, Histograms) else message

    def close(self) -> None:
        """No message follows."""
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()

    def discard(self) -> None:
        """Nobody will take these messages, nor any later one."""
        with self._changed:
            self._is_discarding = True
            self._messages.clear()
            self._changed.notify_all()

    def describe_dropped(self) -> str:
        """`3 histograms and 12 measurements were not sent`."""
        parts = [
            f"{number:,} {name}"
            for number, name in (
                (self.num_dropped_histograms, "sets of histograms"),
                (self.num_dropped_messages, "measurements"),
            )
            if number
        ]
        return " and ".join(parts) + " were not sent"

    def _make_room(self) -> None:
        for index, message in enumerate(self._messages):
            if isinstance(message, Histograms):
                del self._messages[index]
                self.num_dropped_histograms += 1
                return
        self._messages.popleft()
        self.num_dropped_messages += 1


def histograms_message(event: Histograms) -> dict[str, Any]:
    """Arrays as counts and edges of 64 bins; values that are not finite are left out and counted beside them."""
    import numpy as np

    histograms: dict[str, Any] = {}
    num_not_finite = 0
    for name, values in event.arrays.items():
        finite = values[np.isfinite(values)]
        num_not_finite += values.size - finite.size
        if finite.size:
            counts, edges = np.histogram(finite, bins=NUM_BINS)
            histograms[name] = [counts.tolist(), edges.tolist()]
    return {"do": "histograms", "step": event.step, "histograms": histograms, "num_not_finite": num_not_finite}
