"""Read a run's folder back: what `FilesListener` wrote, as one frozen record.

A run that is still going, was killed, or resumed from a checkpoint reads like any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from trietune.errors import UserError
from trietune.io import strict_json
from trietune.io.json_types import JsonMapping, JsonObject
from trietune.io.places import real_path
from trietune.io.run_folders import which_run
from trietune.tracking.events import Evaluated, Prediction
from trietune.tracking.jsonl import CONFIG, ENVIRONMENT, METRICS, PREDICTIONS

BATCH_PICTURE = "batch.json"
_PLACE_KEYS = ("event", "step", "epoch", "time", "when", "num_examples", "intervals", "weights_step")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run, as its files tell it.

    Attributes:
        status: how it last ended: `finished`, `stopped`, `failed`; `running` where the file says nothing of an end.
        seconds: how long it took until then; None while it runs.
        steps: the logged steps, as lines of `metrics.jsonl`.
        notes: (level, text) of what the run said.
        predictions: the latest ones, and whether they are from before or after training.
        predicted_before: what the model said before training, by the id of the example.
        before: the same as whole predictions.
        batch: the picture of the first batch, as `trietune.run.batch_picture` describes it; None if there is none.
        times: (step, seconds of work since the start).
        num_unreadable: lines that are not records.
    """

    name: str
    directory: Path
    status: str
    last_step: int
    num_steps: int
    seconds: float | None
    plan: Sequence[tuple[str, str]]
    config: JsonMapping
    environment: JsonMapping
    steps: Sequence[JsonMapping]
    evaluations: Sequence[Evaluated]
    notes: Sequence[tuple[str, str]]
    predictions: Sequence[Prediction]
    predicted_when: Literal["before", "after"]
    predicted_before: Mapping[str, str]
    num_unreadable: int
    before: Mapping[str, Prediction] = field(default_factory=dict)
    batch: JsonMapping | None = None
    times: Sequence[tuple[int, float]] = ()

    def evaluation(self, when: str) -> Evaluated | None:
        """The last evaluation `before`, `during` or `after` training."""
        return next((evaluation for evaluation in reversed(self.evaluations) if evaluation.when == when), None)

    def newest_evaluation(self) -> Evaluated | None:
        """The one after training, or the last one so far of a run that has not come to its end."""
        return self.evaluation("after") or self.evaluation("during")


def read_run(directory: Path) -> RunRecord:
    """Read the run in `directory`. Raises `UserError` if there is none."""
    path = directory / METRICS
    if not path.is_file():
        raise UserError(
            f"`{directory}` is not a run: it has no {METRICS}",
            next_step=which_run(directory),
        )
    lines, num_unreadable = _read_lines(path)
    of_kind: dict[str, list[JsonObject]] = {}
    for line in lines:
        of_kind.setdefault(str(line.get("event")), []).append(line)
    start = of_kind.get("start", [{}])[-1]
    # An end that is followed by another start belongs to an earlier sitting of the same run.
    end: JsonObject = next((line for line in reversed(lines) if line.get("event") in ("start", "end")), {})
    is_over = end.get("event") == "end"
    predictions, when, earlier = _read_predictions(directory / PREDICTIONS)
    return RunRecord(
        name=real_path(directory).name,
        directory=directory,
        status=str(end.get("status", "failed")) if is_over else "running",
        last_step=max((int(line.get("step") or 0) for line in lines), default=0),
        num_steps=int(start.get("num_steps") or 0),
        seconds=end.get("seconds") if is_over else None,
        plan=[(str(name), str(value)) for name, value in start.get("plan", [])],
        config=_read_yaml(directory / CONFIG),
        environment=_read_json(directory / ENVIRONMENT),
        steps=of_kind.get("step", []),
        evaluations=_evaluations(lines),
        notes=[
            (str(line["event"]), str(line.get("text"))) for line in lines if line.get("event") in ("info", "warning")
        ],
        predictions=predictions,
        predicted_when=when,
        predicted_before={name: prediction.predicted for name, prediction in earlier.items()},
        num_unreadable=num_unreadable,
        before=earlier,
        batch=_read_json(directory / BATCH_PICTURE) or None,
        times=_times(lines),
    )


def _times(lines: Sequence[JsonMapping]) -> list[tuple[int, float]]:
    """(step, seconds of work since the start), without the time between two sittings of one run."""
    found: list[tuple[int, float]] = []
    spent = 0.0
    last: float | None = None
    for line in lines:
        time, step = line.get("time"), line.get("step")
        if not isinstance(time, (int, float)) or not isinstance(step, int):
            continue
        if line.get("event") != "start" and last is not None:
            spent += max(0.0, time - last)
        last = float(time)
        if line.get("event") in ("step", "evaluation", "end"):
            found.append((step, round(spent, 2)))
    return found


def _read_lines(path: Path) -> tuple[list[JsonObject], int]:
    """Records of the kinds that a run writes, and how many lines are none."""
    records, num_unreadable = [], 0
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line, parse_constant=_refuse)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and _is_as_written(record):
            records.append(record)
        else:
            num_unreadable += 1
    return records, num_unreadable


def _refuse(text: str) -> NoReturn:
    raise ValueError(text)


def _is_as_written(record: JsonMapping) -> bool:
    """Whether each value is of the kind that the run's files hold under that key; other keys hold numbers."""
    if "event" in record and not _is_count(record.get("step")):
        return False
    return all(_KINDS.get(key, _is_any if "event" not in record else _is_figure)(value)
               for key, value in record.items())  # fmt: skip


def _is_any(value: object) -> bool:
    return _is_text(value) or _is_figure(value) or isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and find_lone(value) is None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_figure(value: object) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < 1e300)  # type: ignore[arg-type]


def _is_count_or_none(value: object) -> bool:
    return value is None or _is_count(value)


def _is_plan(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and len(row) == 2 and all(map(_is_text, row)) for row in value
    )


def _is_intervals(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_figure, pair)) for pair in value.values()
    )


def _is_figures(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_figure, value.values()))


def _is_flag_or_none(value: object) -> bool:
    return value is None or isinstance(value, bool)


def find_lone(text: str) -> int | None:
    """Where half a character is, which no file and no terminal takes; None if nowhere."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


_KINDS: Mapping[str, Callable[[object], bool]] = {
    **dict.fromkeys(("event", "name", "text", "level", "kind", "directory", "status", "id", "prompt", "expected",
                     "predicted"), _is_text),
    "when": lambda value: value in ("before", "during", "after"),
    **dict.fromkeys(("step", "num_steps", "num_examples"), _is_count),
    "weights_step": _is_count_or_none,
    **dict.fromkeys(("time", "seconds", "epoch", "f1"), _is_figure),
    "plan": _is_plan,
    "intervals": _is_intervals,
    "probabilities": _is_figures,
    "summary": _is_figures,
    "is_right": _is_flag_or_none,
    "ids": lambda value: isinstance(value, list) and all(map(_is_text, value)),
}  # fmt: skip


def _evaluations(lines: Sequence[JsonMapping]) -> list[Evaluated]:
    """In their order. Before 0.1.0 the step of the final weights stood only where the adapter was saved after them."""
    found: list[Evaluated] = []
    for line in lines:
        if line.get("event") == "evaluation":
            found.append(_evaluation(line))
        elif line.get("event") == "saved" and line.get("kind") == "adapter" and found and found[-1].when == "after":
            step = line.get("step")
            if isinstance(step, int) and found[-1].weights_step is None and step != found[-1].step:
                found[-1] = replace(found[-1], weights_step=step)
    return found


def _evaluation(line: JsonMapping) -> Evaluated:
    return Evaluated(
        step=int(line.get("step") or 0),
        epoch=float(line.get("epoch") or 0.0),
        metrics={key: value for key, value in line.items() if key not in _PLACE_KEYS},
        num_examples=int(line.get("num_examples") or 0),
        when=line.get("when", "during"),
        intervals={
            key: (float(pair[0]), float(pair[1]))
            for key, pair in (line.get("intervals") or {}).items()
            if None not in pair
        },
        weights_step=line.get("weights_step"),
    )


def _read_predictions(path: Path) -> tuple[list[Prediction], Literal["before", "after"], dict[str, Prediction]]:
    records = _read_lines(path)[0] if path.is_file() else []
    if not records:
        return [], "after", {}
    last = (records[-1].get("step"), records[-1].get("when"))
    newest = [record for record in records if (record.get("step"), record.get("when")) == last]
    earlier = [_prediction(record) for record in records if record.get("when") == "before"]
    before = {prediction.id: prediction for prediction in earlier}
    return [_prediction(record) for record in _without_repeats(newest)], last[1] or "after", before


def _prediction(record: JsonMapping) -> Prediction:
    texts = {name: str(record.get(name, "")) for name in ("id", "prompt", "expected", "predicted", "kind")}
    shares = record.get("probabilities")
    return Prediction(
        **texts,
        is_right=record.get("is_right"),
        probabilities=shares if isinstance(shares, dict) else {},
        f1=record.get("f1"),
    )


def _without_repeats(records: Iterable[JsonObject]) -> list[JsonObject]:
    """A run that came to this step twice wrote twice; the later answer counts."""
    return list({record.get("id"): record for record in records}.values())


def _read_yaml(path: Path) -> JsonObject:
    """The settings as a run writes them: without anchors, from which a few lines make gigabytes."""

    try:
        text = _bytes_of(path).decode()
        if any(getattr(event, "anchor", None) is not None for event in YAML(typ="safe", pure=True).parse(text)):
            return {}
        content = YAML(typ="safe", pure=True).load(text)
    except (OSError, YAMLError, ValueError, RecursionError, TypeError, AttributeError, KeyError):
        return {}
    return content if _is_clean(content) and all(isinstance(key, str) for key in content) else {}


def _read_json(path: Path) -> JsonObject:
    try:
        content = strict_json.parse(_bytes_of(path))
    except (OSError, ValueError):
        return {}
    return content if _is_clean(content) else {}


def _is_clean(content: object) -> bool:
    """Whether it is an object without half a character, which no page can hold."""
    return isinstance(content, dict) and find_lone(json.dumps(content, ensure_ascii=False, default=str)) is None


def _bytes_of(path: Path) -> bytes:
    """Of a plain file of a size that a run writes; a pipe would wait for ever."""
    if not path.is_file() or path.stat().st_size > strict_json.MAX_BYTES:
        raise FileNotFoundError(path)
    return path.read_bytes()
