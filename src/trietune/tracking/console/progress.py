"""How far a run is, and how that looks in a few lines of a terminal.

`Progress` remembers; `progress_lines` draws, as a pure function of what is remembered, the width and the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from trietune.tracking import wording
from trietune.tracking.events import Evaluated, Metrics, StepFinished

if TYPE_CHECKING:
    from rich.text import Text

NARROWEST_BAR = 10
WIDEST_BAR = 60


@dataclass(slots=True)
class Phase:
    """Work with a bar of its own, such as tokenizing."""

    name: str
    done: int
    total: int | None
    unit: str
    began_s: float

    def line(self) -> str:
        """`tokenizing: 12,000 of 67,349 examples`."""
        if self.total is None:
            return f"{self.name}: {self.done:,} {self.unit}"
        return f"{self.name}: {self.done:,} of {self.total:,} {self.unit}"


class Progress:
    """What is known of a run's progress; steps and seconds come from the events and the caller's clock."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.last_step: int | None = None
        self.phase: Phase | None = None
        self._metrics: Metrics = {}
        self._epoch = 0.0
        self._eval_loss: float | None = None
        self._timed_from: tuple[int, float] | None = None
        self._timed_to: tuple[int, float] | None = None

    def start(self, first_step: int, num_steps: int) -> None:
        """Training begins, or resumes, at `first_step`."""
        self.num_steps = num_steps
        self.last_step = first_step
        self.phase = None

    def work(self, name: str, done: int, total: int | None, unit: str, now_s: float) -> Phase | None:
        """A phase has moved; returns it, or None when it is finished."""
        if self.phase is None or self.phase.name != name:
            self.phase = Phase(name, done, total, unit, now_s)
        self.phase.done, self.phase.total, self.phase.unit = done, total, unit
        if total is not None and done >= total:
            self.phase = None
        return self.phase

    def step(self, event: StepFinished, now_s: float) -> None:
        """A step has finished. Time left is measured from the end of the first one, which has the warm-up in it."""
        self.phase = None
        self.last_step = event.step
        self._metrics = event.metrics
        self._epoch = event.epoch
        self._timed_to = (event.step, now_s)
        if self._timed_from is None:
            self._timed_from = self._timed_to

    def remember_evaluation(self, event: Evaluated) -> None:
        self.phase = None
        value = event.metrics.get("eval/loss")
        self._eval_loss = value if value is not None else self._eval_loss

    def seconds_left(self) -> float | None:
        """From the mean of the steps so far, evaluations and saves included; None before the second step."""
        if self._timed_from is None or self._timed_to is None or self._timed_from == self._timed_to:
            return None
        (first, first_s), (last, last_s) = self._timed_from, self._timed_to
        return (last_s - first_s) / (last - first) * max(0, self.num_steps - last)

    def fields(self) -> list[str]:
        """The numbers of the last step, most wanted first."""
        return [*self.heads(), *self.measures()]

    def heads(self) -> list[str]:
        left = self.seconds_left()
        return [f"epoch {self._epoch:.2f}", *([f"{wording.duration(left)} left"] if left else [])]

    def measures(self) -> list[str]:
        found = []
        loss = self._metrics.get("train/loss")
        if loss is not None:
            found.append(f"loss {wording.number(loss)}")
        if self._eval_loss is not None:
            found.append(f"eval {wording.number(self._eval_loss)}")
        for key, show in (
            ("train/rewards/accuracies", lambda value: f"preferred {100 * value:.0f}%"),
            ("train/rewards/margins", lambda value: f"margin {wording.number(value)}"),
            ("train/accuracy", lambda value: f"right {100 * value:.0f}%"),
            ("examples_per_second", lambda value: f"{wording.rate(value)} examples/s"),
            ("tokens_per_second", lambda value: f"{wording.rate(value)} distinct tokens/s"),
            ("sharing_factor", lambda value: f"sharing {value:.2f}x"),
            ("memory_bytes", wording.size),
        ):
            value = self._metrics.get(key)
            if value is not None:
                found.append(show(value))
        return found


def progress_lines(progress: Progress, width: int, now_s: float, *, is_ascii: bool = False) -> list[Text]:
    """The frame below the passing lines: the phase in work, then the training itself; none is wider than `width`."""
    lines: list[Text] = []
    phase = progress.phase
    if phase is not None:
        lines.append(_phase_line(phase, width, now_s, is_ascii))
    if progress.last_step is not None and progress.num_steps:
        lines.extend(_training_lines(progress, width, is_ascii))
    return lines


def _phase_line(phase: Phase, width: int, now_s: float, is_ascii: bool) -> Text:
    if phase.total is None:
        return _line(phase.name, None, [f"{phase.done:,} {phase.unit}", wording.duration(now_s - phase.began_s)], width)
    share = phase.done / phase.total if phase.total else 1.0
    texts = [f"{phase.done:,}/{phase.total:,} {phase.unit}", f"{100 * share:.0f}%"]
    return _line(phase.name, share, texts, width, is_ascii)


def _training_lines(progress: Progress, width: int, is_ascii: bool) -> list[Text]:
    assert progress.last_step is not None
    share = min(1.0, progress.last_step / progress.num_steps)
    heads = progress.heads() if progress._metrics else []
    texts = [f"{progress.last_step:,}/{progress.num_steps:,}", f"{100 * share:.0f}%", *heads]
    lines = [_line("training", share, texts, width, is_ascii)]
    indent = " " * 10 if width >= 60 else "  "
    row = ""
    for measure in progress.measures():
        if row and len(indent) + len(row) + 3 + len(measure) >= width:
            lines.append(Text((indent + row)[: width - 1], style="dim"))
            row = ""
        row = f"{row}   {measure}" if row else measure
    if row:
        lines.append(Text((indent + row)[: width - 1], style="dim"))
    return lines


def _line(name: str, share: float | None, texts: list[str], width: int, is_ascii: bool = False) -> Text:
    """Name, bar and numbers in one line; numbers leave from the right, then the bar, where there is no room."""
    name = wording.one_line(name, width)
    head = f"{name[: max(10, width // 3)]:<8}"[: max(1, width - 1)]
    while len(texts) > 1 and len(head) + 2 + len("  ".join(texts)) >= width:
        texts = texts[:-1]
    tail = "  ".join(texts)
    line = Text(head, style="bold", no_wrap=True, overflow="crop")
    bar_width = min(WIDEST_BAR, width - 1 - len(head) - len(tail) - 4)
    if share is not None and bar_width >= NARROWEST_BAR:
        line.append("  ")
        line.append_text(_bar(share, bar_width, is_ascii))
    line.append(f"  {tail}"[: max(0, width - 1 - line.cell_len)], style="not bold")
    return line


def _bar(share: float, width: int, is_ascii: bool) -> Text:
    """Done and to come differ in shape as well as in color, so the bar reads without color too."""
    full = int(share * width)
    done, tip, rest = ("#", ">", "-") if is_ascii else ("━", "╸", "┄")
    filled = done * full + (tip if full < width and share > 0 else "")
    bar = Text(filled, style="green not bold")
    bar.append(rest * (width - len(filled)), style="bright_black")
    return bar
