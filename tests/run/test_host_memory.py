"""Freed memory is kept: the second time that a step needs it, no page is asked of the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
if sys.argv[1] == "kept":
    from trietune.host_memory import keep_freed_memory
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


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted as Linux counts them")
def test_what_is_freed_is_used_again_without_page_faults() -> None:
    assert page_faults("as it is") > 10_000  # ten times 48 MB in pages of 4 kB, which is more than glibc ever keeps
    assert page_faults("kept") < 500


def test_a_users_own_allocator_settings_are_left_alone() -> None:
    from trietune.host_memory import keep_freed_memory

    environ = {"MALLOC_TRIM_THRESHOLD_": "1000", "THP_MEM_ALLOC_ENABLE": "0"}
    assert not keep_freed_memory(environ)
    assert environ["THP_MEM_ALLOC_ENABLE"] == "0"
