"""One writer a run directory, named while it lives, forgotten when it dies."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from trietune.checkpoints.lock import LOCK_NAME, RunLock
from trietune.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
if "--as-on-nfs" in sys.argv:
    from checkpoints.test_lock import lock_no_folders
    lock_no_folders()
from trietune.checkpoints.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def lock_no_folders() -> None:
    """NFS locks what is open for writing, and no folder is."""
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(descriptor, operation)

    fcntl.flock = flock


def start_holder(folder: Path, *more: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), "--token=hunter2", *more],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_writer_is_told_who_the_first_is_until_it_is_killed(tmp_path: Path) -> None:
    process = start_holder(tmp_path)
    try:
        with pytest.raises(UserError, match="another process is writing to") as caught, RunLock(tmp_path):
            pass
        assert f"process {process.pid} on {os.uname().nodename}, since" in str(caught.value)
        assert "hunter2" not in (tmp_path / LOCK_NAME).read_text()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    with RunLock(tmp_path):
        pass


def test_where_no_folder_can_be_locked_the_file_has_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)  # put back at the end
    lock_no_folders()
    process = start_holder(tmp_path, "--as-on-nfs")
    try:
        with pytest.raises(UserError, match="another process is writing to"), RunLock(tmp_path):
            pass
    finally:
        process.kill()
        process.communicate()
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("change", ["removed", "replaced", "of another process", "folder moved and back"])
def test_whatever_becomes_of_the_lock_file_a_second_writer_stays_out(tmp_path: Path, change: str) -> None:
    process = start_holder(tmp_path)
    lock = tmp_path / LOCK_NAME
    try:
        before = lock.stat().st_ino
        if change == "folder moved and back":
            moved = tmp_path.with_name(f"{tmp_path.name}-moved")
            tmp_path.rename(moved)
            moved.rename(tmp_path)
        else:
            kept = tmp_path / "kept"
            lock.rename(kept)  # keeps its number from being given to the next one
            assert kept.stat().st_ino == before
        if change == "replaced":
            lock.write_text("")
        if change == "of another process":
            lock.write_text('{"host": "h", "pid": 1, "program": "p", "started": "s"}')
        for _ in range(2):
            with pytest.raises(UserError, match="another process is writing to"), RunLock(tmp_path):
                pass
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    with RunLock(tmp_path):
        pass


def test_200_writers_one_after_the_other_keep_no_lock_open(tmp_path: Path) -> None:
    def locks_open() -> int:
        here = Path("/proc/self/fd")
        return sum(str(tmp_path) in str(one.readlink()) for one in list(here.iterdir()) if os.path.lexists(one))

    held = []
    for number in range(200):
        (tmp_path / str(number)).mkdir()
        lock = RunLock(tmp_path / str(number))
        held.append(lock)  # a caller may keep what it was given
        if number % 2:
            with lock:
                assert locks_open() == 2
        else:
            with pytest.raises(RuntimeError), lock:  # noqa: PT012
                assert locks_open() == 2
                raise RuntimeError
    assert locks_open() == 0


def test_a_lock_file_replaced_by_a_link_is_refused_and_its_target_untouched(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("stays")
    (tmp_path / LOCK_NAME).symlink_to(target)
    with pytest.raises(UserError, match="cannot be written to"), RunLock(tmp_path):
        pass
    assert target.read_text() == "stays"


def test_a_child_does_not_keep_the_lock_of_a_dead_parent(tmp_path: Path) -> None:
    lock = RunLock(tmp_path).__enter__()
    to_child, from_child = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(from_child[1], b"!")
        os.close(to_child[1])
        os.read(to_child[0], 1)
        os._exit(0)
    os.read(from_child[0], 1)
    lock._close()  # what the kernel does with a process that dies: no unlock, only a close
    with RunLock(tmp_path):
        pass
    for descriptor in (*to_child, *from_child):
        os.close(descriptor)
    os.waitpid(child, 0)
