"""What a run says when it ends: before and after side by side, some answers, where things are, what to type next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trietune.io.columns import columns
from trietune.tracking import wording
from trietune.tracking.events import Evaluated, Event, PredictionsShown, RunFinished, RunStarted, Saved

DEFAULT_WIDTH = 100
NARROWEST_TEXT = 20


class Result:
    """Remembers, out of all events of a run, those that its end tells about."""

    def __init__(self) -> None:
        self._started: RunStarted | None = None
        self._before: Evaluated | None = None
        self._after: Evaluated | None = None
        self._predicted: PredictionsShown | None = None
        self._adapter: Path | None = None

    def remember(self, event: Event) -> None:
        """Keep `event` if the result needs it."""
        match event:
            case RunStarted():
                self._started = event
            case Evaluated():
                if event.when == "before":
                    self._before = event
                elif event.when == "after":
                    self._after = event
            case PredictionsShown() if event.num_shown:
                self._predicted = event
            case Saved() if event.kind == "adapter":
                self._adapter = event.directory
            case _:
                pass

    def lines(self, finished: RunFinished, width: int = DEFAULT_WIDTH) -> list[str]:
        """The whole result as lines of plain text."""
        blocks = [
            [self._headline(finished)],
            comparison(self._before, self._after),
            predictions_table(self._predicted, width) if self._predicted else [],
            self._places(),
            ["next", *(f"  {command}" for command in finished.next_commands)] if finished.next_commands else [],
        ]
        lines: list[str] = []
        for block in blocks:
            lines.extend(["", *block] if block else [])
        return lines

    def _headline(self, finished: RunFinished) -> str:
        num_steps = self._started.num_steps if self._started else finished.step
        time = wording.duration(finished.seconds)
        if finished.status == "finished":
            return f"finished: {finished.step:,} steps in {time}"
        return f"{finished.status} after step {finished.step:,} of {num_steps:,}, {time}"

    def _places(self) -> list[str]:
        places = []
        if self._adapter:
            places.append(("adapter", str(self._adapter)))
        if self._started:
            report = self._started.directory / "report.html"
            if report.exists():
                places.append(("report", str(report)))
        return columns(places)


def comparison(before: Evaluated | None, after: Evaluated | None) -> list[str]:
    """Every metric before and after training, with the number of examples and the 95% intervals."""
    evaluations = [evaluation for evaluation in (before, after) if evaluation is not None]
    if not evaluations:
        return []
    titles = {"before": "before", "after": "after", "during": "now"}
    keys = list(dict.fromkeys(key for evaluation in evaluations for key in evaluation.metrics))
    rows = [("", *(_title(titles[evaluation.when], evaluation) for evaluation in evaluations))]
    rows.append(("examples", *(f"{evaluation.num_examples:,}" for evaluation in evaluations)))
    rows += [(wording.metric_name(key), *(_value(evaluation, key) for evaluation in evaluations)) for key in keys]
    lines = columns(rows)
    if any(evaluation.intervals for evaluation in evaluations):
        lines.append("(95% intervals in parentheses)")
    return lines


def predictions_table(predicted: PredictionsShown, width: int = DEFAULT_WIDTH) -> list[str]:
    """What the model says, whether that is right, and about which text: its end, where a prompt is long."""
    title = {"before": "what the model says before training", "after": "what the model says now"}[predicted.when]
    rows = []
    shown = predicted.predictions[: predicted.num_shown]
    for prediction in shown:
        verdict = {True: "right", False: "wrong", None: ""}[prediction.is_right]
        if prediction.is_right is False:
            verdict += f", it is {wording.one_line(prediction.expected, 24)}"
        rows.append((f"  {wording.one_line(prediction.predicted, 32) or '(nothing)'}", verdict))
    used = max((len(line) for line in columns([(*row, "|") for row in rows])), default=0)
    room = max(NARROWEST_TEXT, width - used - 2)
    return [
        title,
        *columns([(*row, subject(p.prompt, room)) for row, p in zip(rows, shown, strict=True)]),
    ]


def subject(prompt: str, width: int) -> str:
    """What an example is about, in one line: the last filled line but one of its prompt, without its field's name.

    Prompts end with a line such as `Output:` that asks for the answer; the line before carries the review or question.
    """
    filled = [line.strip() for line in prompt.split("\n") if line.strip()]
    asked = filled[:-1] if len(filled) > 1 and filled[-1].endswith(":") else filled
    last = asked[-1] if asked else ""
    name, colon, rest = last.partition(": ")
    return wording.one_line(rest if colon and len(name) < 20 else last, width)


def _title(title: str, evaluation: Evaluated) -> str:
    return title if evaluation.is_point else f"{title} (step {evaluation.measured_step:,})"


def _value(evaluation: Evaluated, key: str) -> str:
    if key not in evaluation.metrics:
        return "-"
    text = wording.metric_value(key, evaluation.metrics[key])
    intervals: Mapping[str, tuple[float, float]] = evaluation.intervals
    return f"{text} ({wording.interval(key, *intervals[key])})" if key in intervals else text
