"""No listener can stop a run, and none leaves it in silence."""

from __future__ import annotations

from pathlib import Path

from trietune.tracking.events import Event, Message, PhaseProgress
from trietune.tracking.tracker import StillTrying, Tracker

WORK = PhaseProgress("loading", 1, 2, "files")


class Recorder:
    """Remembers what it hears; raises `error`, at words only if it keeps trying."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name = name
        self.error = error
        self.heard: list[Event] = []
        self.num_closed = 0

    def handle(self, event: Event) -> None:
        self.heard.append(event)
        if self.error and (isinstance(self.error, StillTrying) or not isinstance(event, Message)):
            raise self.error

    def close(self) -> None:
        self.num_closed += 1

    @property
    def said(self) -> list[str]:
        return [event.text for event in self.heard if isinstance(event, Message)]


def test_a_failing_listener_is_dropped_once_and_aloud() -> None:
    broken, console = Recorder("W&B", RuntimeError("no such\nproject")), Recorder("console")
    tracker = Tracker([broken, console])
    for _ in range(3):
        tracker.emit(WORK)
    assert console.said == ["W&B: RuntimeError: no such project; the run continues without it"]
    assert broken.heard == [WORK]
    assert broken.num_closed == 1
    assert [event for event in console.heard if event is WORK] == [WORK] * 3


def test_a_failing_last_listener_leaves_a_word_to_the_others() -> None:
    files, console = Recorder("files"), Recorder("console", BrokenPipeError(32, "Broken pipe"))
    tracker = Tracker([files, console])
    tracker.emit(WORK)
    assert files.said == ["console: [Errno 32] Broken pipe; the run continues without it"]


def test_a_listener_that_keeps_trying_stays_and_is_told_once_an_outage() -> None:
    files, console = Recorder("run files", StillTrying("No space left on device")), Recorder("console")
    tracker = Tracker([files, console])
    tracker.emit(WORK)
    tracker.emit(WORK)
    assert console.said == ["run files: No space left on device; will be tried again at the next event"]
    files.error = None
    tracker.emit(WORK)
    files.error = StillTrying("No space left on device")
    tracker.emit(WORK)
    assert len(console.said) == 2
    assert [event for event in files.heard if event is WORK] == [WORK] * 4


def test_two_listeners_that_fail_at_one_event_are_both_dropped() -> None:
    first, second, console = Recorder("a", ValueError("x")), Recorder("b", KeyError("y")), Recorder("console")
    tracker = Tracker([first, second, console])
    tracker.emit(WORK)
    assert len(console.said) == 2
    assert first.num_closed == second.num_closed == 1


def test_closing_closes_all_even_if_one_cannot() -> None:
    class Stuck(Recorder):
        def close(self) -> None:
            raise OSError(5, "Input/output error")

    stuck, console = Stuck("files"), Recorder("console")
    tracker = Tracker([stuck, console])
    tracker.close()
    assert console.said == ["files: could not be closed: [Errno 5] Input/output error"]
    assert console.num_closed == 1


def test_tracking_loads_neither_torch_nor_a_tracker(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, trietune.tracking.open, trietune.tracking.wandb.listener\n"
        "loaded = {'torch', 'wandb', 'tensorboard', 'trackio', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {sorted(loaded)}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_events_of_two_threads_do_not_mix() -> None:
    import threading

    class Slow(Recorder):
        is_inside = False

        def handle(self, event: Event) -> None:
            assert not self.is_inside
            self.is_inside = True
            threading.Event().wait(0.001)
            self.is_inside = False
            super().handle(event)

    slow = Slow("slow")
    tracker = Tracker([slow])
    threads = [threading.Thread(target=lambda: [tracker.emit(WORK) for _ in range(20)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert slow.heard == [WORK] * 40
