"""Freed memory is kept: the second time that a step needs it, no page is asked of the system."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from trietune.run.malloc import STEPS_BETWEEN, KeptMemory

PROGRAM = """
import resource, sys
if sys.argv[1] == "kept":
    from trietune.run.malloc import keep_freed_memory
    assert keep_freed_memory()
import torch
x = torch.ones(12_000_000)
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20): x * 2
before = faults()
for _ in range(10): x * 2
print(faults() - before)
"""


def page_faults(how: str, **environment: str) -> int:
    import os

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "THP_MEM_ALLOC_ENABLE": "0", **environment},
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted as Linux counts them")
def test_what_is_freed_is_used_again_without_page_faults() -> None:
    assert page_faults("as it is") > 10_000  # ten times 48 MB in pages of 4 kB, which is more than glibc ever keeps
    assert page_faults("kept") < 500


def test_a_users_own_allocator_settings_are_left_alone() -> None:
    from trietune.run.malloc import keep_freed_memory

    environ = {"MALLOC_TRIM_THRESHOLD_": "1000", "THP_MEM_ALLOC_ENABLE": "0"}
    assert not keep_freed_memory(environ)
    assert environ["THP_MEM_ALLOC_ENABLE"] == "0"


FRAGMENTS = """
import sys
from trietune.run.malloc import KeptMemory, keep_freed_memory
assert keep_freed_memory()
import random, torch
from trietune.device.cpu import resident_bytes
kept = KeptMemory(resident_bytes) if sys.argv[1] == "watched" else None
draw, lasting, largest = random.Random(0), [], 0
for step in range(60):
    pieces = [torch.ones(draw.randrange(10_000, 3_000_000)) for _ in range(20)]
    lasting.append(torch.ones(10_000))
    del pieces
    if kept is not None:
        kept.after_step()
    largest = max(largest, resident_bytes())
if kept is not None:
    kept.give_back()
print(largest, resident_bytes())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gaps are those of glibc's heap")
def test_what_is_kept_is_given_back() -> None:
    def largest_and_last(how: str) -> tuple[int, int]:
        done = subprocess.run([sys.executable, "-c", FRAGMENTS, how], capture_output=True, text=True, check=True)
        largest, last = (int(word) for word in done.stdout.split())
        return largest, last

    largest, last = largest_and_last("kept")
    assert last > 0.9 * largest
    assert largest_and_last("watched")[1] < 0.7 * last


def test_looks_now_and_then_and_gives_back_what_has_grown() -> None:
    resident, given_back = [100], []
    kept = KeptMemory(lambda: resident[0], lambda: given_back.append(steps))
    for steps in range(1, 200):
        resident[0] += 3 if steps < 100 else 0
        if given_back and given_back[-1] == steps - 1:
            resident[0] = 100
        kept.after_step()
    assert given_back
    assert max(given_back) < 120
    assert min(np.diff([0, *given_back])) >= STEPS_BETWEEN
