"""Hundreds of SIGKILLs at random moments of a light writer; what it ends with equals what was never interrupted."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest
from light_writer import contents_of, weights_at
from promises import SIZE, check_run, steps_said

from fault_table import Tally
from trietune.io.directory import read_directory

WRITER = Path(__file__).with_name("light_writer.py")


def start_writer(run: Path, *options: str, output: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, str(WRITER), str(run), *options],
        env=environment, stdout=output, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def kill_many_times(tmp_path: Path, num_kills: int) -> tuple[int, int, list[str]]:
    """Kills that hit a living writer, how many of them fell into a save, and what was lost."""
    randomness = random.Random(20)
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    num_done, num_in_save, failures, output = 0, 0, [], ""
    startup_s = 0.15
    while num_done < num_kills:
        process = start_writer(run, "--until", "1000000", "--mirror", str(mirror))
        begun = time.monotonic()
        assert process.stdout is not None
        first = ""
        # One in ten dies while it starts, cleans up and reads; the others while they step, save, remove and copy.
        if num_done % 10:
            first = process.stdout.readline()
            startup_s = 0.8 * startup_s + 0.2 * (time.monotonic() - begun)
            time.sleep(randomness.uniform(0, 0.12))
        else:
            time.sleep(randomness.uniform(0, 1.2 * startup_s))
        process.kill()
        rest, errors = process.communicate()
        assert process.returncode == -9, f"it was not killed: {errors}"
        num_done += 1
        life = first + rest
        saving, ended = steps_said(life, "saving"), steps_said(life, "saved")
        num_in_save += len(saving) > len(ended)
        output += life
        try:
            check_run(run, output, mirror=mirror)
        except AssertionError as error:
            failures.append(f"kill {num_done}: {error}")
        output = "\n".join(f"saved {step}" for step in steps_said(output, "saved")[-1:]) + "\n"
    last = check_run(run, output)
    until = last + 20
    process = start_writer(run, "--until", str(until))
    final, errors = process.communicate()
    assert process.returncode == 0, errors
    assert steps_said(final, "finished") == [until]
    assert read_directory(run / "adapter")[1] == contents_of(weights_at(until), until, SIZE)
    return num_done, num_in_save, failures


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_470_kills_lose_nothing_and_the_end_is_bit_equal(tmp_path: Path, tally: Tally) -> None:
    num_done, num_in_save, failures = kill_many_times(tmp_path, 470)
    tally("SIGKILL of the light writer at random", num_done, num_done - len(failures))
    assert not failures, "\n".join(failures[:5])
    assert num_in_save >= 100, f"only {num_in_save} kills fell into a save"


def test_a_few_kills_lose_nothing(tmp_path: Path) -> None:
    _, _, failures = kill_many_times(tmp_path, 4)
    assert not failures, "\n".join(failures)
