"""A token cache that is cut short while it is mapped: a sentence, where the system would end the process (SIGBUS)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from trietune.data import cache
from trietune.errors import StopRequested


def big_array(folder: Path) -> Path:
    path = folder / "input_ids.npy"
    np.save(path, np.arange(100_000, dtype=np.int32))
    return path


def test_the_unguarded_map_is_killed(tmp_path: Path) -> None:
    path = big_array(tmp_path)
    child = os.fork()
    if child == 0:
        mapped = np.load(path, mmap_mode="r")
        os.truncate(path, 4096)
        int(mapped[90_000])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGBUS


@pytest.mark.parametrize("key", [90_000, slice(80_000, 90_000), np.array([1, 90_000])], ids=["one", "slice", "several"])
def test_a_cut_is_seen_before_the_page_is_touched(tmp_path: Path, key: object) -> None:
    path = big_array(tmp_path)
    guarded = cache._open_array(path)
    assert int(np.asarray(guarded[90_000])) == 90_000
    os.truncate(path, 4096)
    with pytest.raises(StopRequested, match="cut short") as stopped:
        guarded[key]
    assert stopped.value.exit_code == 2


def test_a_file_that_is_removed_or_replaced_is_still_whole_to_who_has_it(tmp_path: Path) -> None:
    path = big_array(tmp_path)
    guarded = cache._open_array(path)
    path.unlink()
    path.write_bytes(b"")
    assert int(guarded[90_000]) == 90_000
    assert type(guarded[5:9]) is np.ndarray
