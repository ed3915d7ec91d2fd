"""The three numbers of a batch, padded, real and distinct, and what they mean in seconds at this run's speed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from trietune.tracking.report.record import RunRecord


@dataclass(frozen=True, slots=True)
class BatchNumbers:
    """Attributes:
    seconds: time that the distinct positions of the batch take at the run's median speed; None if it was not measured.
    seconds_padded: time that padded rows would take, were a padded position as fast as one of the trie.
    left_out: examples that are counted and not drawn.
    """

    num_examples: int
    num_padded: int
    num_real: int
    num_distinct: int
    seconds: float | None
    seconds_padded: float | None
    left_out: int

    @property
    def factor(self) -> float:
        return self.num_padded / max(1, self.num_distinct)


def batch_numbers(run: RunRecord) -> BatchNumbers | None:
    """Of the run's first batch; None if no picture of it was kept, or one that cannot be read."""
    batch = run.batch
    names = ("num_examples", "num_padded", "num_real", "num_distinct", "num_left_out")
    if batch is None or batch.get("version") != 1 or not all(isinstance(batch.get(name), int) for name in names):
        return None
    rates: list[Any] = [line.get("tokens_per_second") for line in run.steps]
    rates = [rate for rate in rates if isinstance(rate, (int, float)) and rate > 0]
    rate = statistics.median(rates) if rates else None
    return BatchNumbers(
        num_examples=batch["num_examples"],
        num_padded=batch["num_padded"],
        num_real=batch["num_real"],
        num_distinct=batch["num_distinct"],
        seconds=batch["num_distinct"] / rate if rate else None,
        seconds_padded=batch["num_padded"] / rate if rate else None,
        left_out=batch["num_left_out"],
    )
