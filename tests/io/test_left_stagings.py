"""What a killed export or conversion leaves is removed by the next one beside it; what is being written is not."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trietune.io.whole_folder import whole_folder

WRITER = """
import sys, time
from pathlib import Path
from trietune.io.whole_folder import whole_folder
with whole_folder(Path(sys.argv[1])) as staging:
    (staging / "weights").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


def start_writer(final: Path) -> subprocess.Popen[str]:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(final)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    with writer.stdout as output:
        assert output.readline() == "ready\n"
    return writer


def test_what_a_killed_writer_left_goes_with_the_next_and_a_living_one_stays(tmp_path: Path) -> None:
    killed, living = start_writer(tmp_path / "a"), start_writer(tmp_path / "b")
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        left = tmp_path / f".a.staging-{killed.pid}"
        assert left.is_dir()
        with whole_folder(tmp_path / "c") as staging:
            (staging / "file").write_text("")
        assert not left.exists()
        assert (tmp_path / f".b.staging-{living.pid}" / "weights").exists()
    finally:
        living.kill()
        living.wait()


@pytest.mark.parametrize("name", [".mine.staging-notes", ".staging-1", "a.staging-999999999", ".x.staging-12 copy"])
def test_nothing_of_another_name_is_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with whole_folder(tmp_path / "c"):
        pass
    assert (tmp_path / name).is_dir()


def test_a_link_of_such_a_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "file").write_text("")
    (tmp_path / ".x.staging-999999999").symlink_to(tmp_path / "own")
    with whole_folder(tmp_path / "c"):
        pass
    assert (tmp_path / "own" / "file").exists()
