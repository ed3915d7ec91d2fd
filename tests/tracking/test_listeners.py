"""What the key `tracker` chooses, and the two small trackers, read back."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trietune.errors import UserError
from trietune.tracking.console.console import ConsoleListener
from trietune.tracking.events import Event, Histograms, StepFinished
from trietune.tracking.open import open_tracker

Events = Callable[..., Iterator[Event]]


def names(**options: object) -> list[str]:
    return [listener.name for listener in open_tracker(**options)._listeners]  # type: ignore[arg-type]


def test_files_come_first_and_the_console_last() -> None:
    assert names() == ["run files", "report", "console"]
    assert names(writes_files=False) == ["console"]


def test_auto_is_wandb_where_it_is_used() -> None:
    assert names(use_wandb=True) == ["run files", "W&B", "report", "console"]
    assert names(use_wandb=False, tracker="wandb") == ["run files", "W&B", "report", "console"]
    assert names(use_wandb=True, tracker="none") == ["run files", "report", "console"]
    assert names(use_wandb=True, tracker="tensorboard") == ["run files", "TensorBoard", "report", "console"]
    assert names(tracker="trackio") == ["run files", "trackio", "report", "console"]


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "trackio"])
def test_a_tracker_asked_for_by_name_must_be_installed(tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        open_tracker(tracker=tracker)  # type: ignore[arg-type]
    assert caught.value.what == f"`tracker: {tracker}` needs the package `{tracker}`, which is not installed"
    assert f"pip install 'trietune[{tracker}]'" in str(caught.value.next_step)


def test_use_wandb_without_wandb_is_one_line(tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    err = io.StringIO()
    tracker = open_tracker(use_wandb=True, console=ConsoleListener(io.StringIO(), err))
    for event in events(tmp_path / "sst2"):
        tracker.emit(event)
    tracker.close()
    told = [line for line in err.getvalue().splitlines() if "W&B" in line]
    assert told == ["W&B: not installed, the run continues without it; `pip install 'trietune[wandb]'`"]
    assert (tmp_path / "sst2" / "report.html").exists()


def test_tensorboard_reads_back(tmp_path: Path, events: Events, histograms: Histograms) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from trietune.tracking.tensorboard import TensorboardListener

    listener = TensorboardListener()
    for event in events(tmp_path / "sst2"):
        listener.handle(event)
        if isinstance(event, StepFinished) and event.step == histograms.step:
            listener.handle(histograms)
    listener.close()
    read = EventAccumulator(str(tmp_path / "sst2" / "tensorboard"))
    read.Reload()
    assert [(point.step, point.value) for point in read.Scalars("train/loss")] == [
        (step, pytest.approx(2.0 / step)) for step in (2, 4, 6, 8, 10, 12)
    ]
    assert [point.step for point in read.Scalars("eval/accuracy")] == [0, 6, 12, 12]
    (point,) = read.Histograms("gradients/lora_A")
    assert (point.step, point.histogram_value.num, point.histogram_value.max) == (4, 2.0, 3.0)


def test_trackio_reads_back(tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: trackio takes its folder from the environment when it is imported."""
    pytest.importorskip("trackio")
    import json
    import os
    import subprocess
    import sys
    import textwrap

    script = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from conftest import run_events
        from trietune.tracking.trackio import TrackioListener
        for first_step in (0, 6):
            listener = TrackioListener(project="films")
            for event in run_events(Path({str(tmp_path / "sst2")!r}), first_step=first_step):
                listener.handle(event)
            listener.close()
        import json
        from trackio.sqlite_storage import SQLiteStorage
        runs = SQLiteStorage.get_runs("films")
        logs = SQLiteStorage.get_logs("films", "sst2")
        print(json.dumps([runs, [[log["step"], log["train/loss"]] for log in logs if "train/loss" in log]]))
        """
    )
    environ = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    runs, losses = json.loads(done.stdout)  # trackio's greetings are on stderr
    assert runs == ["sst2"]
    assert [tuple(pair) for pair in losses] == [(s, pytest.approx(2.0 / s)) for s in (2, 4, 6, 8, 10, 12, 8, 10, 12)]
