"""Messages on their way to a slow receiver: bounded, never blocking the sender, and counting what was dropped."""

from __future__ import annotations

import threading
from collections import deque

from trietune.tracking.events import Histograms

MOST_MESSAGES = 100_000
MOST_HISTOGRAMS = 2
NUM_BINS = 64


class Outbox:
    """Measurements in order, and apart from them a few histograms, which are large and never displace a measurement."""

    def __init__(self, most_messages: int = MOST_MESSAGES, most_histograms: int = MOST_HISTOGRAMS) -> None:
        # One more measurement than fits pushes the oldest one out.
        self._messages: deque[dict[str, object]] = deque(maxlen=most_messages)
        self._histograms: deque[Histograms] = deque()
        self._most_histograms = most_histograms
        self._changed = threading.Condition()
        self._is_closed = self._is_discarding = False
        self.is_begun = False
        self.num_dropped_histograms = self.num_dropped_messages = 0

    def __len__(self) -> int:
        return len(self._messages) + len(self._histograms)

    def put(self, message: dict[str, object] | Histograms) -> None:
        """Queue a message; histograms only where fewer than the limit wait, since a later one says more."""
        with self._changed:
            if self._is_discarding:
                return
            if not isinstance(message, Histograms):
                self.num_dropped_messages += len(self._messages) == self._messages.maxlen
                self._messages.append(message)
            elif len(self._histograms) < self._most_histograms:
                self._histograms.append(message)
            else:
                self.num_dropped_histograms += 1
            self._changed.notify()

    def take(self) -> dict[str, object] | None:
        """The next message, waiting for it; None when the outbox is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._histograms or self._messages or self._is_closed)
            # Histograms first: what ends a run is the last measurement.
            waiting = self._histograms or self._messages
            if not waiting:
                return None
            self.is_begun = True
            message = waiting.popleft()
        return histograms_message(message) if isinstance(message, Histograms) else message

    def close(self, *, discard: bool = False) -> None:
        """No message follows; with `discard`, those that wait are dropped, and so is any later one."""
        with self._changed:
            self._is_closed = True
            self._is_discarding |= discard
            if discard:
                self._messages.clear()
                self._histograms.clear()
            self._changed.notify_all()

    def describe_dropped(self) -> str:
        """`3 sets of histograms and 12 measurements were not sent`; empty if all were."""
        dropped = ((self.num_dropped_histograms, "sets of histograms"), (self.num_dropped_messages, "measurements"))
        parts = [f"{number:,} {name}" for number, name in dropped if number]
        return " and ".join(parts) + " were not sent" if parts else ""


def histograms_message(event: Histograms) -> dict[str, object]:
    """Arrays as counts and edges of 64 bins; values that are not finite are left out and counted beside them."""
    import numpy as np

    histograms: dict[str, object] = {}
    num_not_finite = 0
    for name, values in event.arrays.items():
        finite = values[np.isfinite(values)]
        num_not_finite += values.size - finite.size
        if finite.size:
            counts, edges = np.histogram(finite, bins=NUM_BINS)
            histograms[name] = [counts.tolist(), edges.tolist()]
    return {"do": "histograms", "step": event.step, "histograms": histograms, "num_not_finite": num_not_finite}
