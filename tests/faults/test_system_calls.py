"""Killed before each system call that changes the disk, and each call made to fail: nothing that was saved is lost."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import light_writer
import pytest
from crash_states import recording
from promises import check_run, steps_said

from fault_table import Tally

WRITER = Path(__file__).with_name("light_writer.py")
CALLS = ("openat", "write", "pwrite64", "ftruncate", "fsync", "rename", "mkdir", "unlink", "rmdir")
# What each call can return on a real file system, from its manual page.
ERRORS = {
    "openat": ("ENOSPC", "EACCES", "EROFS", "EDQUOT", "EMFILE"),
    "write": ("ENOSPC", "EIO", "EDQUOT", "EFBIG"),
    "fsync": ("EIO", "ENOSPC", "EDQUOT"),
    "rename": ("EIO", "ENOSPC", "EACCES", "EROFS", "EDQUOT"),
    "mkdir": ("ENOSPC", "EACCES", "EROFS", "EDQUOT"),
    "unlink": ("EIO", "EACCES", "EROFS"),
    "rmdir": ("EIO", "EACCES"),
}
NUM_SAVES = 3


def strace_works() -> str | None:
    if shutil.which("strace") is None:
        return "strace is not installed"
    done = subprocess.run(["strace", "-qqq", "-e", "trace=fsync", "true"], capture_output=True, check=False)
    return None if done.returncode == 0 else "this kernel does not let us trace"


NO_STRACE = strace_works()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(NO_STRACE is not None, reason=str(NO_STRACE)),
]


@dataclass(frozen=True)
class Call:
    """The `index`-th call of its name in the whole process, counted from 1, on a path of the run or its mirror."""

    name: str
    index: int
    line: str


def run_writer(folder: Path, *strace_options: str) -> subprocess.CompletedProcess[str]:
    """One life of the writer under strace; its trace is in `folder/trace`."""
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    trace = ["strace", "-f", "-qqq", "-y", "-s", "0", "-e", "signal=none", "-o", str(folder / "trace")]
    writer = [os.path.realpath(sys.executable), str(WRITER), str(folder / "run"), "--mirror", str(folder / "mirror")]
    return subprocess.run(
        [*trace, *strace_options, *writer, "--until", str(NUM_SAVES)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def changing_calls(folder: Path) -> list[Call]:
    """One clean run: every call that changes something below `folder`, addressed as strace counts them."""
    done = run_writer(folder, "-e", f"trace={','.join(CALLS)}")
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = {}
    found = []
    for line in (folder / "trace").read_text().splitlines():
        match = re.match(r"\d+ +(\w+)\(", line)
        if match is None:
            continue
        name = match[1]
        counts[name] = counts.get(name, 0) + 1
        is_change = name != "openat" or "O_CREAT" in line or ("O_DIRECTORY" in line and "O_NONBLOCK" not in line)
        if f"{folder}/" in line and is_change and "/metrics.jsonl" not in line:
            found.append(Call(name, counts[name], line))
    return found


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[Call]:
    folder = tmp_path_factory.mktemp("clean")
    found = changing_calls(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    again = changing_calls(folder)
    assert [(call.name, call.index) for call in found] == [(call.name, call.index) for call in again]
    return found


def test_the_recording_is_what_the_kernel_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of operations that the crash states are made from lacks nothing and adds nothing."""
    names = {"mkdir": "mkdir", "create": "openat", "write": "write", "fsync": "fsync", "fsyncdir": "fsync",
             "rename": "rename", "unlink": "unlink", "rmdir": "rmdir"}  # fmt: skip
    traced = tmp_path / "traced"
    traced.mkdir()
    calls = [
        call.name for call in changing_calls(traced) if "O_DIRECTORY" not in call.line and "/.lock" not in call.line
    ]
    recorded = tmp_path / "recorded"
    (recorded / "run").mkdir(parents=True)
    with recording(recorded, monkeypatch) as operations:
        light_writer.main([str(recorded / "run"), "--mirror", str(recorded / "mirror"), "--until", str(NUM_SAVES)])
    # What the trace leaves out: flushes of the log, which the store did not create, and of the folder above the run.
    seen = [item for item in operations if item.name in names and item.path not in ("", ".")]
    expected = [names[item.name] for item in seen]
    assert calls[1:] == expected, "the run directory itself is made by the writer"


def test_a_kill_before_any_call_loses_nothing_that_was_saved(calls: list[Call], tmp_path: Path, tally: Tally) -> None:
    failures = []
    calls = [call for call in calls if "O_DIRECTORY" not in call.line]
    for call in calls:
        folder = tmp_path / f"{call.name}-{call.index}"
        folder.mkdir()
        done = run_writer(
            folder, "-e", f"trace={call.name}", "-e", f"inject={call.name}:signal=SIGKILL:when={call.index}"
        )
        assert done.returncode in (137, -9), f"{call} did not kill: {done.returncode} {done.stderr}"
        try:
            step = check_run(folder / "run", done.stdout, mirror=folder / "mirror")
            second = run_writer(folder, "-e", "trace=none")
            assert steps_said(second.stdout, "resumed") == [step]
            assert steps_said(second.stdout, "finished") == [NUM_SAVES]
            check_run(folder / "run", done.stdout + second.stdout, mirror=folder / "mirror")
        except AssertionError as error:
            failures.append(f"{call}: {error}")
        shutil.rmtree(folder)
    tally("SIGKILL before each changing system call", len(calls), len(calls) - len(failures))
    assert len(calls) >= 100
    assert not failures, "\n".join(failures[:5])


@pytest.mark.parametrize("mode", ["once", "from here on"])
def test_any_call_that_fails_is_said_and_loses_nothing(
    mode: str, calls: list[Call], tmp_path: Path, tally: Tally
) -> None:
    cases = [(call, name) for call in _one_of_each_role(calls) for name in ERRORS.get(call.name, ())]
    failures = []
    for call, name in cases:
        folder = tmp_path / f"{call.name}-{call.index}-{name}"
        folder.mkdir()
        when = f"{call.index}" if mode == "once" else f"{call.index}+"
        done = run_writer(folder, "-e", f"trace={call.name}", "-e", f"inject={call.name}:error={name}:when={when}")
        trace = (folder / "trace").read_text()
        assert "INJECTED" in trace, f"{call} {name} injected nothing"
        try:
            check_run(folder / "run", done.stdout, mirror=folder / "mirror")
            if mode == "once":
                _check_said(done, call, name)
        except AssertionError as error:
            failures.append(f"{call.name} {call.index} {name} {mode}: {error}")
        shutil.rmtree(folder)
    tally(f"errors of system calls, {mode}", len(cases), len(cases) - len(failures))
    assert not failures, f"{len(failures)} of {len(cases)}:\n" + "\n".join(failures[:5])


def _check_said(done: subprocess.CompletedProcess[str], call: Call, name: str) -> None:
    number = str(getattr(errno, name))
    words = [line.split() for line in done.stdout.splitlines()]
    said = [line for line in words if (line[0] in ("failed", "uncopied") and line[2] == number) or line[0] == "warning"]
    stopped = done.returncode != 0
    assert said or stopped, f"nobody was told: {done.stdout}"
    if not stopped:
        steps = steps_said(done.stdout, "saved")
        assert len(steps) >= NUM_SAVES - 1, f"more than one save was given up: {done.stdout}"


def _one_of_each_role(calls: list[Call]) -> list[Call]:
    """The last call of each kind on each kind of file: by then earlier checkpoints are there to be lost."""
    roles = {}
    for call in calls:
        path = re.sub(r"[0-9a-f]{12}|[0-9]+", "#", call.line.partition("/run")[2] or call.line)
        roles[call.name, path] = call
    return list(roles.values())
