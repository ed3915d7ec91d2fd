"""What ends a run in time: signals of people and machines, and `max_time` from the start of the command."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trietune import load_config
from trietune.device.cpu import resident_bytes
from trietune.errors import StopRequested
from trietune.io.directory import verify_directory
from trietune.run.result import Run
from trietune.run.signals import process_age_s
from trietune.run.train import train
from trietune.tracking.events import Event, StepFinished
from trietune.tracking.tracker import Tracker

Settings = dict[str, object]


class Sender:
    """Sends signals to its own process when step 2 has been taken."""

    name = "sender"

    def __init__(self, numbers: tuple[signal.Signals, ...]) -> None:
        self.numbers = numbers
        self.has_sent = False

    def handle(self, event: Event) -> None:
        if isinstance(event, StepFinished) and event.step == 2:
            for number in self.numbers:
                os.kill(os.getpid(), number)
            self.has_sent = True

    def close(self) -> None:
        pass


def start(settings: Settings, *numbers: signal.Signals) -> Run:
    sender = Sender(numbers)
    made = load_config(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    run = train(made, tracker=Tracker([sender]))
    assert sender.has_sent
    return run


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGHUP,),
        (signal.SIGXCPU,),
        (signal.SIGPWR,),
        (signal.SIGHUP, signal.SIGHUP, signal.SIGHUP),
        (signal.SIGXCPU, signal.SIGXCPU),
        (signal.SIGTERM, signal.SIGHUP),
    ],
)
def test_signals_of_machines_save_and_their_repetition_harms_nothing(
    numbers: tuple[signal.Signals, ...], overrides: Settings
) -> None:
    stopped = start({**overrides, "self_check": False}, *numbers)
    assert (stopped.status, stopped.step, stopped.exit_code) == ("stopped", 2, 128 + numbers[0])
    verify_directory(stopped.directory / "checkpoints" / "step-00000002")


@pytest.fixture
def ignored() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("ignored")
def test_what_was_ignored_at_the_start_stays_ignored(overrides: Settings) -> None:
    assert start({**overrides, "self_check": False}, signal.SIGHUP, signal.SIGINT).status == "finished"
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGUSR2, signal.SIGALRM])
def test_other_signals_keep_the_systems_meaning(number: signal.Signals) -> None:
    code = f"import os, time\nfrom trietune.run.signals import StopSignals\nwith StopSignals():\n    os.kill(os.getpid(), {int(number)})\n    time.sleep(60)"  # noqa: E501
    limit = lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # noqa: E731
    done = subprocess.run([sys.executable, "-c", code], check=False, preexec_fn=limit)
    assert done.returncode == -number


@pytest.mark.slow
def test_a_closed_terminal_saves(overrides: Settings, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({**overrides, "max_steps": 4000, "num_epochs": 4000, "self_check": False}))
    master, slave = os.openpty()
    command = [sys.executable, "-m", "trietune", "train", str(config)]
    code = (
        "import fcntl, os, sys, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\nos.execv(sys.executable, sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    os.close(slave)
    os.set_blocking(master, False)
    lines = tmp_path / "runs" / "run" / "batches.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.exists() and lines.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline
        assert process.poll() is None
        try:
            os.read(master, 65536)
        except BlockingIOError:
            time.sleep(0.01)
    os.close(master)
    assert process.wait(60) == 128 + signal.SIGHUP
    [saved] = (tmp_path / "runs" / "run" / "checkpoints").glob("step-*")
    verify_directory(saved)


def test_max_time_counts_what_came_before_the_first_step(overrides: Settings) -> None:
    made = load_config(None, [f"{key}={json.dumps(value)}" for key, value in {**overrides, "max_time": 60}.items()])
    with pytest.raises(StopRequested, match="max_time") as caught:
        train(made, tracker=Tracker(), began=time.monotonic() - 59)
    assert caught.value.exit_code == 0
    assert not (Path(str(overrides["project_dir"])) / "run").exists()


def test_max_time_ends_an_evaluation_with_the_work_saved(overrides: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [0.0]
    monkeypatch.setattr("trietune.run.stopping.time.monotonic", lambda now=time.monotonic: now() + passed[0])

    class Clock(Sender):
        def handle(self, event: Event) -> None:
            if isinstance(event, StepFinished) and event.step == 3:
                passed[0] = 3600.0

    made = load_config(
        None,
        [f"{key}={json.dumps(value)}" for key, value in
         {**overrides, "max_time": 3600, "max_steps": 3, "self_check": False}.items()],
    )  # fmt: skip
    stopped = train(made, tracker=Tracker([Clock(())]))
    assert (stopped.status, stopped.step, stopped.exit_code) == ("stopped", 3, 0)
    verify_directory(stopped.directory / "checkpoints" / "step-00000003")


def test_a_process_knows_its_age() -> None:
    code = "import time; time.sleep(0.5)\nfrom trietune.run.signals import process_age_s\nprint(process_age_s())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) >= 0.5
    assert process_age_s() > 0


def test_without_a_free_descriptor_memory_is_as_it_last_was() -> None:
    before = resident_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files") as caught:
            os.open("/proc/self/statm", os.O_RDONLY)
        found = resident_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE
    assert found == before > 0
