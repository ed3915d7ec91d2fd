"""What a person sees: bars on a terminal, plain lines elsewhere, the result on stdout."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import textwrap
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path

import pytest

from trietune.tracking.console.console import ConsoleListener, evaluation_line
from trietune.tracking.console.progress import Progress, progress_lines
from trietune.tracking.console.result import predictions_table, subject
from trietune.tracking.events import (
    Evaluated,
    Event,
    PhaseProgress,
    Prediction,
    PredictionsShown,
    RunFinished,
    RunStarted,
)

Events = Callable[..., Iterator[Event]]
Golden = Callable[[str, str], None]
RUN = Path("runs/sst2")


class Clock:
    """A second passes at each look."""

    def __init__(self, step_s: float = 1.0) -> None:
        self.now = 0.0
        self.step_s = step_s

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


def shown(events: Iterator[Event], clock: Clock | None = None, encoding: str = "utf-8") -> tuple[str, str]:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    listener = ConsoleListener(out, err, clock=clock or Clock())
    for event in events:
        listener.handle(event)
    listener.close()
    return tuple(stream.buffer.getvalue().decode(encoding) for stream in (out, err))  # type: ignore[return-value]


def test_a_run_off_a_terminal(events: Events, golden: Golden) -> None:
    out, err = shown(events(RUN))
    golden("tracking/plain_stdout.txt", out)
    golden("tracking/plain_stderr.txt", err)


def test_a_log_has_no_carriage_returns_and_stays_small(events: Events) -> None:
    """Ten thousand steps in under an hour give some hundred lines, not ten thousand."""
    _, err = shown(events(RUN, num_steps=10_000), clock=Clock(0.1))
    assert "\r" not in err
    assert "\x1b" not in err
    step_lines = [line for line in err.splitlines() if line.startswith("step ")]
    assert 50 < len(step_lines) < 500
    assert step_lines[-1].startswith("step 10,000/10,000")


def test_the_result_goes_to_stdout_and_all_else_to_stderr(events: Events) -> None:
    out, err = shown(events(RUN))
    assert out.strip().startswith("finished: 12 steps in 1:33")
    assert "50.5% (45.5 to 55.5)" in out
    assert "87.5% (82.5 to 92.5)" in out
    assert re.search(r"examples +200 +200", out)
    assert "adapter  runs/sst2/adapter" in out
    assert "step 12/12" in err
    assert "finished" not in err


def test_a_stopped_run_says_where(events: Events) -> None:
    run = [*events(RUN)][:-1]
    out, _ = shown(iter([*run, RunFinished("stopped", 7, 60.0, {}, ["trietune train sst2.yaml --resume"])]))
    assert "stopped after step 7 of 12, 1:00" in out
    assert "  trietune train sst2.yaml --resume" in out


def test_a_stream_without_unicode_gets_escapes_instead_of_an_error(events: Events) -> None:
    run = [*events(RUN)][:-1]
    said = PredictionsShown(12, "after", [Prediction("a", "Review: très bien\nOutput:", "positive", "naïve", True)])
    out, _ = shown(iter([*run, said, RunFinished("finished", 12, 1.0, {})]), encoding="ascii")
    assert "na\\xefve" in out


def test_a_short_phase_passes_in_silence_and_a_long_one_says_how_far_it_is() -> None:
    quick = [PhaseProgress("tokenizing", done, 100, "examples") for done in (0, 50, 100)]
    assert shown(iter(quick), clock=Clock(0.1))[1] == ""
    slow = [PhaseProgress("tokenizing", done, 100, "examples") for done in range(0, 100, 10)]
    lines = shown(iter(slow), clock=Clock(2.0))[1].splitlines()
    assert all(re.fullmatch(r"tokenizing: \d0 of 100 examples", line) for line in lines)
    assert 1 < len(lines) < 6


def test_an_evaluation_names_its_examples_and_interval() -> None:
    event = Evaluated(50, 0.5, {"eval/exact_match": 0.5, "eval/f1": 0.61}, 872, "during", {"eval/f1": (0.58, 0.64)})
    assert evaluation_line(event) == "evaluation at step 50, 872 examples: exact match 50.0%, f1 61.0% (58.0 to 64.0)"


@pytest.mark.parametrize("width", [12, 20, 40, 60, 80, 100, 200])
def test_no_line_of_the_frame_is_wider_than_the_terminal(events: Events, width: int) -> None:
    progress = Progress()
    for event in events(RUN):
        if isinstance(event, RunStarted):
            progress.start(0, event.num_steps)
        elif event.__class__.__name__ == "StepFinished":
            progress.step(event, event.step * 2.0)  # type: ignore[attr-defined, arg-type]
    progress.work("evaluating the validation examples", 50, 100, "examples", 30.0)
    for is_ascii in (True, False):
        for line in progress_lines(progress, width, 31.0, is_ascii=is_ascii):
            assert line.cell_len < width, line.plain
            assert not is_ascii or line.plain.isascii()


def test_frames_by_width(events: Events, golden: Golden) -> None:
    """The frame while it trains and evaluates, as plain text at four widths."""
    progress = Progress()
    frames = []
    for event in events(RUN, num_steps=8):
        if isinstance(event, RunStarted):
            progress.start(0, event.num_steps)
        elif isinstance(event, Evaluated):
            progress.remember_evaluation(event)
        elif event.__class__.__name__ == "StepFinished" and event.step <= 5:  # type: ignore[attr-defined]
            progress.step(event, event.step * 20.0)  # type: ignore[attr-defined, arg-type]
    progress.work("evaluating", 50, 100, "examples", 130.0)
    for width in (120, 80, 50, 24):
        lines = [line.plain.rstrip() for line in progress_lines(progress, width, 131.0)]
        frames.append("\n".join([f"--- {width} columns", *lines]))
    golden("tracking/frames.txt", "\n".join(frames) + "\n")


def test_time_left_comes_from_the_steps_so_far() -> None:
    from trietune.tracking.events import StepFinished

    progress = Progress()
    progress.start(0, 100)
    progress.step(StepFinished(1, 0.0, {}, [], True), 60.0)  # a minute of warm-up
    assert progress.seconds_left() is None
    progress.step(StepFinished(11, 0.0, {}, [], True), 80.0)
    assert progress.seconds_left() == pytest.approx(89 * 2.0)


def test_predictions_fit_the_width_and_show_what_they_are_about() -> None:
    prompt = (
        "\nContext: a b c\n\nQuestion: Who sang it, and when and where did the song become so well known?\n\nAnswer:\n"
    )
    predicted = PredictionsShown(1, "after", [Prediction("q1", prompt, "Ann", "Bob\x1b[0m", False)])
    for width in (60, 80, 120):
        lines = predictions_table(predicted, width)
        assert all(len(line) <= width for line in lines)
        assert "Who sang it" in lines[1]
        assert "wrong, it is Ann" in lines[1]
        assert "\x1b" not in lines[1]
    assert subject("Review: fine\nOutput:", 50) == "fine"
    assert subject("one line without a field", 50) == "one line without a field"


SCRIPT = textwrap.dedent(
    """
    import sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from conftest import run_events
    from trietune.tracking.console.console import ConsoleListener
    console = ConsoleListener()
    for event in run_events(Path("runs/sst2")):
        console.handle(event)
    console.close()
    """
)


def on_a_terminal(columns: int = 100, **environment: str) -> str:
    """What a terminal receives: stdout and stderr of the same run, both on a pseudo-terminal."""
    main, child = pty.openpty()
    ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    inherited = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    code = SCRIPT.format(tests=str(Path(__file__).parent))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=child,
        stdout=child,
        stderr=child,
        env={**inherited, "TERM": "xterm-256color", **environment},
        close_fds=True,
    )
    os.close(child)
    received = b""
    while True:
        if select.select([main], [], [], 20.0)[0] == []:
            process.kill()
            pytest.fail("the console does not end")
        try:
            block = os.read(main, 65536)
        except OSError:  # the other side is closed
            break
        if not block:
            break
        received += block
    os.close(main)
    assert process.wait() == 0, received.decode()
    return received.decode()


def test_a_terminal_gets_bars_that_leave_no_trace() -> None:
    received = on_a_terminal()
    assert "━" in received
    assert "\x1b[2K" in received  # the frame is wiped
    assert received.index("\x1b[?25h") > received.index("\x1b[?25l")  # the cursor comes back
    after = received[received.rindex("\x1b[2K") :]
    assert "finished: 12 steps" in after
    assert "━" not in after


def test_no_color_is_respected() -> None:
    received = on_a_terminal(NO_COLOR="1")
    assert "finished: 12 steps" in received
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m|\x1b\[[0-9;]*38;", received)


def test_a_dumb_terminal_gets_plain_lines() -> None:
    received = on_a_terminal(TERM="dumb")
    assert "\x1b" not in received
    assert "━" not in received
    assert "step 12/12" in received


def test_a_narrow_terminal_is_no_trouble() -> None:
    assert "finished: 12 steps" in on_a_terminal(columns=20)
