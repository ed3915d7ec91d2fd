"""Two machines train as one; a cable that is cut is noticed on both ends, and either goes on by itself."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from hosts.conftest import Hosts
from trietune.cli.app import main

LIMIT_S = 400
# After the cut: 30 s without an answer, 20 s until that is looked at, twice that on a busy machine.
NOTICED_S = 100


def torchrun(hosts: Hosts, settings: dict[str, object]) -> list[subprocess.Popen[str]]:
    given = [f"--set={key}={value}" for key, value in settings.items()]
    return [
        hosts.start(
            number, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts.address(0)}:29500", "--rdzv-id", "hosts",
            "--rdzv-conf", f"is_host={int(number == 0)},timeout=120,read_timeout=20",
            "--local-addr", hosts.address(number), "-m", "trietune", "train", *given,
        )
        for number in (0, 1)
    ]  # fmt: skip


def kill(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(LIMIT_S)


class Told:
    """What a process says, as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.lines: list[str] = []
        self._process = process
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as said:
            for line in said:
                self.lines.append(line)

    def end(self) -> None:
        """Wait for the last line of a process that has ended."""
        self._thread.join(LIMIT_S)

    def errors(self) -> list[str]:
        return [line for line in self.lines if line.startswith("error:")]


def digest(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def settings(overrides: dict[str, object]) -> dict[str, object]:
    return {**overrides, "num_epochs": 1000, "steps_freq": 2, "save_strategy": "step", "save_optim": True,
            "val_steps_freq": 100_000}  # fmt: skip


def test_two_machines_train_what_two_processes_train(hosts: Hosts, settings: dict[str, object]) -> None:
    processes = torchrun(hosts, settings)
    try:
        told = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    finally:
        kill(processes)
    assert [process.returncode for process in processes] == [0, 0], told
    runs = Path(str(settings["project_dir"]))
    given = [f"--set={key}={value}" for key, value in {**settings, "wandb_run_name": "here"}.items()]
    here = [sys.executable, "-m", "trietune", "train", "--nproc", "2", *given]
    subprocess.run(here, check=True, capture_output=True, timeout=LIMIT_S, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert digest(runs / "run") == digest(runs / "here")


def test_a_cut_cable_is_said_on_both_ends_and_the_run_goes_on(
    hosts: Hosts, settings: dict[str, object], capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path(str(settings["project_dir"])) / "run"
    processes = torchrun(hosts, {**settings, "max_steps": 500_000, "lr_scheduler_type": "constant"})
    told = [Told(process) for process in processes]
    try:
        deadline = time.monotonic() + LIMIT_S
        while len(list((run / "checkpoints").glob("step-*"))) < 2:
            assert all(process.poll() is None for process in processes), [one.lines for one in told]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        hosts.cut()
        began = time.monotonic()
        said: dict[int, float] = {}
        while len(said) < 2 and time.monotonic() < began + NOTICED_S:
            for number, one in enumerate(told):
                if one.errors():
                    said.setdefault(number, time.monotonic() - began)
            time.sleep(0.2)
        code = processes[0].wait(LIMIT_S)
        # On the other machine torchrun waits for the store that it was cut off from for minutes; our process has gone.
        left = psutil.Process(processes[1].pid).children(recursive=True) if processes[1].poll() is None else []
        left = [one for one in left if one.status() != psutil.STATUS_ZOMBIE]
    finally:
        kill(processes)
        for one in told:
            one.end()
    with capfd.disabled():
        print(f"\na cut cable: said after {said} s, by machine")
        print("".join(line for one in told for line in one.errors()))
    assert len(said) == 2, [one.lines for one in told]
    for one in told:
        assert any(
            part in one.errors()[0] for part in ("has not been heard of", "is cut off", "connection to another")
        ), one.lines
    assert code
    assert not left
    newest = max(int(path.name.partition("-")[2]) for path in (run / "checkpoints").glob("step-*"))
    assert main(["verify", str(run)]) == 0
    given = [f"--set={key}={value}" for key, value in settings.items() if key != "max_steps"]
    more = [f"--set=max_steps={newest + 2}", "--set=lr_scheduler_type=constant", "--allow-change", "max_steps"]
    assert main(["train", "--resume", *given, *more]) == 0
    assert json.loads((run / "adapter" / "manifest.json").read_text())
