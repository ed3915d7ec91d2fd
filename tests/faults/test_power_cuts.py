"""The plug is pulled on a real file system: an image in a loop device is copied while a writer works on it.

The copy is what the disk holds at that moment. Mounted, its journal recovers it as after a power cut. What the writer
had acknowledged before the copy must be there. Needs root and loop devices.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from promises import check_run
from test_kills import start_writer

from fault_table import Tally

NUM_CUTS = 100
# Sizes are the smallest that each mkfs accepts; a long commit interval leaves more unflushed, so more is lost.
FILE_SYSTEMS = {
    "ext4": (24, ["mkfs.ext4", "-q", "-F"], "loop,commit=60"),
    "xfs": (300, ["mkfs.xfs", "-q", "-f"], "loop,nouuid"),
    "btrfs": (120, ["mkfs.btrfs", "-q", "-f", "--mixed"], "loop,commit=60"),
}


def run_tool(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


def why_not(kind: str, folder: Path) -> str | None:
    """None when this machine can make, mount and unmount such a file system."""
    _, mkfs, options = FILE_SYSTEMS[kind]
    if os.geteuid() != 0:
        return "mounting needs root"
    if shutil.which(mkfs[0]) is None:
        return f"{mkfs[0]} is not installed"
    try:
        make_image(kind, folder / "trial")
        with mounted(folder / "trial", folder / "trial-mount", options):
            pass
    except subprocess.CalledProcessError as error:
        return f"{kind} cannot be mounted here: {error.stderr.decode().strip()[:200]}"
    finally:
        (folder / "trial").unlink(missing_ok=True)
    return None


def make_image(kind: str, path: Path) -> None:
    megabytes, mkfs, _ = FILE_SYSTEMS[kind]
    with path.open("wb") as file:
        file.truncate(megabytes * 2**20)
    run_tool(*mkfs, path)


@contextmanager
def mounted(image: Path, point: Path, options: str) -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    run_tool("mount", "-o", options, image, point)
    try:
        yield point
    finally:
        for _ in range(50):
            if subprocess.run(["umount", str(point)], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"{point} stays mounted")


def cut_many_times(kind: str, tmp_path: Path, num_cuts: int, *writer_options: str) -> tuple[int, int, list[str]]:
    """Cuts made, cuts after which something unacknowledged was really missing, and promises broken."""
    _, _, options = FILE_SYSTEMS[kind]
    randomness = random.Random(7)
    image, copy, said = tmp_path / "disk", tmp_path / "disk-copy", tmp_path / "said"
    make_image(kind, image)
    num_done, num_effective, failures = 0, 0, []
    with mounted(image, tmp_path / "mount", options) as point:
        (point / "run").mkdir()
        run_tool("sync")
        with said.open("w") as output:
            process = start_writer(
                point / "run", "--until", "1000000", "--size", "60000", *writer_options, output=output
            )
        try:
            while num_done < num_cuts:
                time.sleep(randomness.uniform(0.02, 0.15))
                process.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, process.pid, os.WSTOPPED)
                acknowledged = said.read_text()
                seen = tree_names(point / "run")
                run_tool("cp", "--sparse=always", image, copy)
                process.send_signal(signal.SIGCONT)
                with mounted(copy, tmp_path / "mount-copy", options) as after:
                    num_effective += tree_names(after / "run") != seen
                    try:
                        check_after_cut(after / "run", acknowledged)
                    except AssertionError as error:
                        failures.append(f"cut {num_done}: {error}"[:300])
                num_done += 1
        finally:
            process.kill()
            process.communicate()
    return num_done, num_effective, failures


def check_after_cut(run: Path, acknowledged: str) -> None:
    """The promises, with the log's last lines allowed to be lost beyond the newest checkpoint."""
    if acknowledged.count("saved ") == 0 and not run.exists():
        return
    check_run(run, acknowledged, size=60_000)


def tree_names(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size if path.is_file() else -1
        for path in folder.rglob("*")
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_a_power_cut_never_loses_what_was_acknowledged(kind: str, tmp_path: Path, tally: Tally) -> None:
    if reason := why_not(kind, tmp_path):
        pytest.skip(reason)
    num_done, num_effective, failures = cut_many_times(kind, tmp_path, NUM_CUTS)
    tally(f"power cuts of {kind}", num_done, num_done - len(failures))
    assert not failures, f"{len(failures)} of {num_done}:\n" + "\n".join(failures[:5])
    assert num_effective >= num_done // 20, f"only {num_effective} cuts lost anything at all: nothing was tested"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_without_flushes_a_power_cut_does_lose_something(tmp_path: Path, tally: Tally) -> None:
    if reason := why_not("ext4", tmp_path):
        pytest.skip(reason)
    num_done, _, failures = cut_many_times("ext4", tmp_path, 25, "--without", "flush", "--without", "flush_folder")
    tally("power cuts of ext4 with the flushes taken out (must lose)", num_done, num_done - len(failures))
    assert failures, "the method would not notice a missing flush"
