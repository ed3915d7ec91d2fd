"""Show a run to the person who started it: progress while it works, the result when it ends.

Progress, counts and warnings go to stderr; the result goes to stdout, so `trietune train > result.txt` keeps it. On a
terminal one bar moves at the bottom while lines pass above it:

    training  ━━━━━━━━━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━  120/400  30%  epoch 0.48  2:10 left
              loss 0.4123   eval 0.3911   8.5 examples/s   360 distinct tokens/s   sharing 4.1x   1.3 GB

Anywhere else (a file, a pipe, `TERM=dumb`) the same numbers come as plain lines, no more than one every few seconds.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from trietune.io.columns import columns
from trietune.io.python_words import as_python
from trietune.tracking import wording
from trietune.tracking.console import result
from trietune.tracking.console.marked import marked_text
from trietune.tracking.console.notebook import NotebookScreen, is_notebook
from trietune.tracking.console.progress import Progress, progress_lines
from trietune.tracking.events import (
    Evaluated,
    Event,
    ExamplesShown,
    MarkedExample,
    Message,
    PhaseProgress,
    PredictionsShown,
    Removed,
    RunFinished,
    RunStarted,
    Saved,
    StepFinished,
)
from trietune.tracking.terminal import can_encode, encodable, write_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.text import Text

SECONDS_BETWEEN_LINES = 5.0
REFRESHES_PER_SECOND = 4


class ConsoleListener:
    """Writes a run to two text streams; stderr shows a moving bar if it is a terminal that can.

    Args:
        out: where the result goes; stdout if None.
        err: where everything else goes; stderr if None.
        clock: seconds that only grow.
    """

    name = "console"

    def __init__(
        self,
        out: TextIO | None = None,
        err: TextIO | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        in_python: bool = False,
    ) -> None:
        # None: closed before Python began.
        self._out = out or sys.stdout or io.StringIO()
        self._err = err or sys.stderr or io.StringIO()
        self._clock = clock
        self._progress = Progress()
        self._result = result.Result()
        self._last_line_s: float | None = None
        self._in_python = in_python
        self._screen: _Screen | NotebookScreen | None = None
        if out is None and err is None and is_notebook():
            self._screen = NotebookScreen(self._frame, clock=clock)
        elif can_show_bars(self._err):
            self._screen = _Screen(self._err, self._frame)

    def handle(self, event: Event) -> None:
        """Show `event`; what the result needs is remembered until the run ends."""
        self._result.remember(event)
        match event:
            case RunStarted():
                self._write_plan(event)
                self._progress.start(event.first_step, event.num_steps)
            case Message():
                text = wording.line(event.text)
                self._write(f"warning: {text}" if event.level == "warning" else text, event.level)
            case PhaseProgress():
                self._show_work(event)
            case ExamplesShown():
                for example in event.examples:
                    self._write_example(example)
            case StepFinished():
                self._show_step(event)
            case Evaluated():
                self._progress.remember_evaluation(event)
                self._write(evaluation_line(event))
            case Saved():
                self._write(wording.line(f"{event.kind} of step {event.step:,}: {event.directory}"))
            case Removed():
                self._write(f"removed {event.directory.name}", "quiet")
            case RunFinished():
                if self._in_python:
                    event = replace(event, next_commands=tuple(map(as_python, event.next_commands)))
                self._stop_screen()
                self._write_result(event)
            case PredictionsShown():
                pass  # part of the result

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._stop_screen()

    def _show_work(self, event: PhaseProgress) -> None:
        now = self._clock()
        phase = self._progress.work(event.phase, event.done, event.total, event.unit, now)
        if self._screen:
            self._screen.start()
        elif phase is not None and self._is_time_for_a_line(max(phase.began_s, self._last_line_s or 0.0)):
            self._write_line(phase.line())

    def _show_step(self, event: StepFinished) -> None:
        self._progress.step(event, self._clock())
        if self._screen:
            self._screen.start()
            return
        is_first_or_last = self._last_line_s is None or event.step == self._progress.num_steps
        if event.is_logged and (is_first_or_last or self._is_time_for_a_line(self._last_line_s)):
            self._write_line("  ".join([f"step {event.step:,}/{self._progress.num_steps:,}", *self._progress.fields()]))

    def _is_time_for_a_line(self, since_s: float | None) -> bool:
        return since_s is None or self._clock() - since_s >= SECONDS_BETWEEN_LINES

    def _write_line(self, text: str) -> None:
        self._last_line_s = self._clock()
        self._write(text)

    def _write_plan(self, event: RunStarted) -> None:
        self._write(wording.line(f"{event.name}: {event.directory}"), "strong")
        for line in columns([(f"  {name}", value) for name, value in event.plan]):
            self._write(wording.line(line))

    def _write_example(self, example: MarkedExample) -> None:
        self._write(f"example {example.id}: what the model reads, with [label tokens] in brackets", "strong")
        if self._screen:
            self._screen.print_marked(example)
        else:
            self._write(marked_text(example).plain)

    def _write_result(self, event: RunFinished) -> None:
        width = self._screen.width if self._screen else result.DEFAULT_WIDTH
        self._err.flush()
        write_text(self._out, "\n".join(map(wording.line, self._result.lines(event, width))) + "\n")

    def _write(self, text: str, style: str = "info") -> None:
        if self._screen:
            self._screen.print_styled(wording.visible(text), style)
        else:
            write_text(self._err, text + "\n")

    def _frame(self, width: int) -> list[Text]:
        return progress_lines(self._progress, width, self._clock(), is_ascii=not can_encode(self._err, "━╸"))

    def _stop_screen(self) -> None:
        if self._screen:
            self._screen.stop()


def evaluation_line(event: Evaluated) -> str:
    """One evaluation in one line, with its interval and the number of examples."""
    parts = []
    for key, value in event.metrics.items():
        text = f"{wording.metric_name(key)} {wording.metric_value(key, value)}"
        if key in event.intervals:
            text += f" ({wording.interval(key, *event.intervals[key])})"
        parts.append(text)
    moment = {"before": "before training", "after": "after training", "during": f"at step {event.step:,}"}[event.when]
    if not event.is_point:
        moment += f" of the weights of step {event.measured_step:,}"
    return f"evaluation {moment}, {event.num_examples:,} examples: " + ", ".join(parts)


def can_show_bars(stream: TextIO) -> bool:
    """Whether `stream` is a terminal on which a line can be drawn again."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


class _Screen:
    """A terminal: lines that pass, and a frame below them that is drawn again and again while something works."""

    _STYLES = {"info": "", "warning": "yellow", "strong": "bold", "quiet": "dim"}  # noqa: RUF012  (never changed)

    def __init__(self, stream: TextIO, frame: Callable[[int], list[Text]]) -> None:
        self._stream = stream
        self._console: Console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._frame = frame
        self._live: Live | None = None

    @property
    def width(self) -> int:
        return self._console.width

    def start(self) -> None:
        """Begin to draw the frame; nothing happens if it is drawn already."""
        if self._live is not None:
            return
        # stdout is left alone: it carries data, and may go to a file.
        self._live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
            redirect_stdout=False,
        )
        self._live.start()

    def stop(self) -> None:
        """Wipe the frame and give the cursor back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def print_marked(self, example: MarkedExample) -> None:
        pieces = [(encodable(self._stream, piece), is_label) for piece, is_label in example.pieces]
        self._console.print(marked_text(MarkedExample(example.id, pieces)), soft_wrap=True)
        self._refresh()

    def print_styled(self, text: str, style: str) -> None:
        self._console.print(encodable(self._stream, text), style=self._STYLES[style], soft_wrap=True)
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()  # else the frame of before the line stays for a moment

    def _render(self) -> RenderableType:
        return Group(*self._frame(self._console.width))
