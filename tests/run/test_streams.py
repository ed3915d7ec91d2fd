"""Standard streams that are full, closed or gone: what a command says of itself by its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trietune.checkpoints.store import CheckpointStore

COMMAND = f"{sys.executable} -m trietune"


def shell(command: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=120, check=False, **options
    )  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one whole checkpoint."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    folder.mkdir()
    (folder / ".run-id").write_text("abc\n")
    CheckpointStore(folder, "abc", 3, 0, "eval/loss", "min").save(1, {"weights": b"x" * 100})
    return folder


@pytest.fixture(scope="module")
def damaged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    copy = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "step-00000001" / "weights").write_bytes(b"y" * 100)
    return copy


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("redirection", "code"),
    [
        ("> /dev/full", 8),
        ("<&- >&- 2>&-", 8),
        pytest.param(">&-", 8, marks=slow),
        pytest.param(">&- 2>&-", 8, marks=slow),
        pytest.param("> /dev/full 2> /dev/full", 8, marks=slow),
        pytest.param("2>&- > /dev/null", 0, marks=slow),
        pytest.param("2>/dev/full >/dev/null", 0, marks=slow),
        pytest.param("<&- >/dev/null", 0, marks=slow),
        pytest.param("| true", 0, marks=slow),
    ],
)
def test_a_whole_run_is_not_called_damaged_whatever_the_streams(run: Path, redirection: str, code: int) -> None:
    ended = shell(f"{COMMAND} verify {run} {redirection}")
    assert ended.returncode == code, ended.stderr
    if code == 8 and "2>" not in redirection:
        assert "standard output could not be written" in ended.stderr


@pytest.mark.parametrize(
    "redirection", ["> /dev/full", *(pytest.param(text, marks=slow) for text in ("", ">&-", "| true", "2>&- >&-"))]
)
def test_damage_keeps_its_code_whatever_the_streams(damaged: Path, redirection: str) -> None:
    assert shell(f"{COMMAND} verify {damaged} {redirection}").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("--version > /dev/full", 8),
        ("bogus 2>&-", 2),
        pytest.param("--help >&-", 8, marks=slow),
        pytest.param("checkpoints /nowhere 2>/dev/full", 2, marks=slow),
        pytest.param("train --bogus 2>/dev/full", 2, marks=slow),
        pytest.param("--help | true", 0, marks=slow),
        pytest.param("train --show-config > /dev/full", 8, marks=slow),
    ],
)
def test_every_command_says_by_its_code_what_happened(arguments: str, code: int) -> None:
    assert shell(f"{COMMAND} {arguments}").returncode == code


def test_a_closed_descriptor_is_given_to_no_file(run: Path) -> None:
    source = (
        "import sys, os; from trietune.cli import streams; streams.guard_streams(); "
        "f = open(sys.argv[1], 'w'); os.write(2, b'noise'); print(f.fileno(), file=f)"
    )
    target = run.parent / "log"
    ended = shell(f'{sys.executable} -c "{source}" {target} <&- >&- 2>&-')
    assert ended.returncode == 0
    assert int(target.read_text()) > 2


def test_a_pipe_that_does_not_wait_gets_everything(run: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    lines = "print('x' * 300_000)"
    source = f"from trietune.cli import streams; streams.guard_streams(); {lines}; import sys; sys.stdout.flush()"
    process = subprocess.Popen([sys.executable, "-c", source], stdout=writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert len(pipe.read()) == 300_001
    assert process.wait() == 0
