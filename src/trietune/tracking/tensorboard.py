"""Keep a run's curves and histograms as TensorBoard event files; needs the package `tensorboard`, and no torch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event as Record
from tensorboard.compat.proto.histogram_pb2 import HistogramProto
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from trietune.tracking.events import Evaluated, Event, Histograms, Metrics, RunStarted, StepFinished

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

FOLDER = "tensorboard"
NUM_BINS = 64


class TensorboardListener:
    """Writes `<run>/tensorboard/`; `tensorboard --logdir <run>` shows it."""

    name = "TensorBoard"

    def __init__(self) -> None:
        self._writer: EventFileWriter | None = None

    def handle(self, event: Event) -> None:
        """Write the numbers of `event`, with the run's own steps as the axis."""
        match event:
            case RunStarted():
                self._writer = EventFileWriter(str(event.directory / FOLDER))
            case StepFinished() if event.is_logged:
                self._write_scalars(event.step, event.metrics)
            case Evaluated() if event.is_point:
                self._write_scalars(event.step, event.metrics)
                if self._writer:
                    self._writer.flush()
            case Histograms():
                self._write(event.step, [_histogram(name, values) for name, values in event.arrays.items()])
            case _:
                pass

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None

    def _write_scalars(self, step: int, metrics: Metrics) -> None:
        known = {key: value for key, value in metrics.items() if value is not None}
        self._write(step, [Summary.Value(tag=key, simple_value=value) for key, value in known.items()])

    def _write(self, step: int, values: list[object]) -> None:
        if self._writer:
            self._writer.add_event(Record(wall_time=time.time(), step=step, summary=Summary(value=values)))


def _histogram(name: str, values: object) -> object:
    """Counts in 64 bins, in TensorBoard's own form; values that are not finite are left out."""
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    counts, edges = np.histogram(finite, bins=NUM_BINS) if finite.size else (np.zeros(1), np.zeros(2))
    proto = HistogramProto(
        min=float(finite.min()) if finite.size else 0.0,
        max=float(finite.max()) if finite.size else 0.0,
        num=float(finite.size),
        sum=float(finite.sum()),
        sum_squares=float((finite**2).sum()),
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )
    return Summary.Value(tag=name, histo=proto)
