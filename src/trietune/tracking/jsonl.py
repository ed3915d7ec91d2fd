"""Keep a run in plain files: what was measured, which examples met in each step, settings and environment.

    metrics.jsonl       {"event": "step", "step": 10, "epoch": 0.25, "time": 1764000000.123, "train/loss": 0.61, ...}
                        {"event": "evaluation", "step": 50, "when": "during", "eval/loss": 0.44, "intervals": {...}}
    batches.jsonl       {"step": 10, "epoch": 0.25, "ids": ["train.tsv:17", ...]}
    predictions.jsonl   {"step": 400, "when": "after", "id": "dev.tsv:3", "predicted": "positive", ...}
    config.yaml, environment.json

Lines are strict JSON (a number that is not finite becomes null), appended whole and flushed one by one. Before a run
opens its files, `trietune.checkpoints.resume.abandon_lines` has moved aside the lines beyond its checkpoint and a last
line that a crash tore.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from trietune.io import files
from trietune.io.json_types import JsonMapping, JsonObject
from trietune.tracking.events import (
    Evaluated,
    Event,
    Message,
    Prediction,
    PredictionsShown,
    Removed,
    RunFinished,
    RunStarted,
    Saved,
    StepFinished,
)
from trietune.tracking.tracker import StillTrying

METRICS = "metrics.jsonl"
BATCHES = "batches.jsonl"
PREDICTIONS = "predictions.jsonl"
CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
_ONLY_IF_THERE = ("probabilities", "f1", "kind")
LINE_FILES = (METRICS, BATCHES, PREDICTIONS)


class FilesListener:
    """Writes a run's files. Without space or permission it keeps the lines and tries again at the next event."""

    name = "run files"

    def __init__(self, *, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._step = 0
        self._early: list[Message] = []
        self._started: RunStarted | None = None
        self._has_written_settings = False
        self._files: dict[str, LineFile] = {}

    def handle(self, event: Event) -> None:
        """Append the lines of `event`. Raises `StillTrying` when the disk takes nothing."""
        if self._started is None and not isinstance(event, RunStarted):
            if isinstance(event, Message):
                self._early.append(event)  # the run's folder has no name yet
            return
        if isinstance(event, RunStarted):
            self._start(event)
        for name, record in self._lines_of(event):
            self._files[name].add(to_json_line(record))
        self._write(flush_to_disk=isinstance(event, (Saved, RunFinished)))

    def close(self) -> None:
        """Write what is still waiting. Raises OSError when that fails."""
        try:
            for file in self._files.values():
                file.write(flush_to_disk=True)
        finally:
            for file in self._files.values():
                file.close()

    def _start(self, event: RunStarted) -> None:
        self._started = event
        self._step = event.first_step
        self._files = {name: LineFile(event.directory / name) for name in LINE_FILES}
        for said in self._early:
            self._files[METRICS].add(to_json_line(self._said(said)))
        self._early.clear()

    def _write(self, *, flush_to_disk: bool) -> None:
        assert self._started is not None
        try:
            if not self._has_written_settings:
                self._started.directory.mkdir(parents=True, exist_ok=True)
                write_settings(self._started.directory, self._started.config, self._started.environment)
                self._has_written_settings = True
            for file in self._files.values():
                file.write(flush_to_disk=flush_to_disk)
        except OSError as error:
            num_waiting = sum(file.num_waiting for file in self._files.values())
            raise StillTrying(f"{error.strerror or error} ({num_waiting} lines wait in memory)") from error

    def _said(self, said: Message) -> JsonObject:
        return {"event": said.level, "step": self._step, "time": self._time(), "text": said.text}

    def _time(self) -> float:
        return round(self._now(), 3)

    def _lines_of(self, event: Event) -> list[tuple[str, JsonObject]]:
        head: JsonObject
        stamp = {"time": self._time()}
        match event:
            case RunStarted():
                head = {"event": "start", "step": event.first_step, **stamp, "name": event.name}
                return [(METRICS, {**head, "num_steps": event.num_steps, "plan": [list(row) for row in event.plan]})]
            case Message():
                return [(METRICS, self._said(event))]
            case StepFinished():
                self._step = event.step
                lines = [(BATCHES, {"step": event.step, "epoch": event.epoch, "ids": list(event.example_ids)})]
                if event.is_logged:
                    head = {"event": "step", "step": event.step, "epoch": event.epoch, **stamp}
                    lines.append((METRICS, {**head, **event.metrics}))
                return lines
            case Evaluated():
                head = {"event": "evaluation", "step": event.step, "epoch": event.epoch, **stamp, "when": event.when}
                body = {**head, **event.metrics, "num_examples": event.num_examples}
                if event.weights_step is not None:
                    body["weights_step"] = event.weights_step
                return [(METRICS, {**body, "intervals": {name: list(pair) for name, pair in event.intervals.items()}})]
            case PredictionsShown():
                head = {"step": event.step, "when": event.when}
                return [(PREDICTIONS, {**head, **prediction_record(prediction)}) for prediction in event.predictions]
            case Saved():
                head = {"event": "saved", "step": event.step, **stamp, "kind": event.kind, **event.metrics}
                return [(METRICS, {**head, "directory": self._relative(event.directory), "seconds": event.seconds})]
            case Removed():
                directory = self._relative(event.directory)
                return [(METRICS, {"event": "removed", "step": event.step, **stamp, "directory": directory})]
            case RunFinished():
                head = {"event": "end", "step": event.step, **stamp, "status": event.status, "seconds": event.seconds}
                return [(METRICS, {**head, "summary": dict(event.summary)})]
            case _:
                return []

    def _relative(self, directory: Path) -> str:
        """As seen from the run's folder, so that a run can be moved."""
        assert self._started is not None
        try:
            return directory.relative_to(self._started.directory).as_posix()
        except ValueError:
            return str(directory)


class LineFile:
    """A file of lines that only grows; a failed write leaves nothing half-written and loses nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[bytes] = []
        self._descriptor: int | None = None
        self._size_bytes = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, line: bytes) -> None:
        """Queue one line; `write` takes it to the file."""
        self._waiting.append(line)

    def write(self, *, flush_to_disk: bool = False) -> None:
        """Append every waiting line. Raises OSError; the lines then still wait."""
        if not self._waiting and self._descriptor is None:
            return  # a file without a line is not made
        if self._descriptor is None:
            self._open()
        assert self._descriptor is not None
        content = memoryview(b"".join(self._waiting))
        try:
            while content:
                content = content[os.write(self._descriptor, content) :]
        except OSError:
            os.ftruncate(self._descriptor, self._size_bytes)  # a full disk takes a part of a line, then refuses
            raise
        self._size_bytes += sum(map(len, self._waiting))
        self._waiting.clear()
        if flush_to_disk:
            os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> None:
        if os.path.lexists(self._path) and not stat.S_ISREG(self._path.lstat().st_mode):
            raise OSError(errno.EINVAL, f"{self._path.name} is not a plain file")
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        self._descriptor = os.open(self._path, flags, 0o666)
        self._size_bytes = os.fstat(self._descriptor).st_size


def to_json_line(record: JsonMapping) -> bytes:
    """`record` as one line of strict JSON: what is not finite becomes null, what JSON does not know becomes text."""
    text = json.dumps(plain(record), ensure_ascii=False, allow_nan=False)
    for char in "\x85\u2028\u2029":  # line breaks to some readers, though not to JSON
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text.encode("utf-8", "backslashreplace") + b"\n"


def prediction_record(prediction: Prediction) -> JsonObject:
    """What every prediction has, and of the rest what this one has."""
    record = asdict(prediction)
    return {name: value for name, value in record.items() if name not in _ONLY_IF_THERE or value not in ("", None, {})}


def plain(value: object) -> Any:
    """`value` in JSON's own types; NumPy numbers become numbers, paths and anything else text."""
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "tolist"):  # a NumPy scalar or array
        return plain(value.tolist())
    return str(value)


def write_settings(directory: Path, config: JsonMapping, environment: JsonMapping) -> None:
    """Write `config.yaml` and `environment.json`, each whole or not at all."""
    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # keep the order of the settings
    yaml.dump(plain(config), text)
    files.replace_file(directory / CONFIG, text.getvalue().encode())
    content = json.dumps(plain(environment), ensure_ascii=False, allow_nan=False, indent=2)
    files.replace_file(directory / ENVIRONMENT, content.encode("utf-8", "backslashreplace") + b"\n")
