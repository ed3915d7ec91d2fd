"""Memory that a training process frees stays its own, so that the next step does not ask the system for it again.

A step frees and takes hundreds of megabytes in pieces of some megabytes. The C library hands such pieces back to the
system at once, and every page of the next piece then costs a page fault: some 5% of a step on two cores. No torch
here: the settings must be there before its first allocation.

Pieces of ever new sizes leave gaps that nothing fits into: kept for good, they would make a process of 2 GB one of 4 GB
in thirty steps. So what is kept is given back whenever it has grown.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, MutableMapping

# Steps between two looks at what is kept, and the growth that is let be: a step after giving back costs more.
STEPS_BETWEEN, MOST_GROWTH = 8, 1.2
STEPS_TO_SETTLE = 4

# From <malloc.h> of glibc.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
DEFAULT_MMAP_MAX = 65536
# Pieces of this size are the system's again when they are freed; set, the bound no longer grows by itself.
SHARDED_MMAP_THRESHOLD = 1_000_000
# Variables and tunables by which a user decides otherwise.
DECIDED_BY_USER = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
)


def keep_freed_memory(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Let the C library keep what is freed, and PyTorch ask for large pages; whether the C library took it.

    The C library is left alone where another allocator is preloaded, where the user has set it up, and off glibc;
    large pages are left alone where `THP_MEM_ALLOC_ENABLE` is set.
    """
    environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if any(environ.get(name) for name in DECIDED_BY_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(M_MMAP_MAX, 0))


def give_back_freed_memory() -> None:
    """Hand what is kept to the system, gaps included; without glibc, nothing."""
    if os.name == "posix" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def hand_back_freed_memory() -> None:
    """Undo `keep_freed_memory`: a process that gathers layers and lets them go would keep all of them."""
    if any(os.environ.get(name) for name in DECIDED_BY_USER):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, DEFAULT_MMAP_MAX)
        mallopt(M_MMAP_THRESHOLD, SHARDED_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, SHARDED_MMAP_THRESHOLD)


class KeptMemory:
    """Watches a process that takes steps, and gives back what it keeps when that has grown.

    Args:
        resident_bytes: what the process has of the machine's memory.
    """

    def __init__(
        self, resident_bytes: Callable[[], int], give_back: Callable[[], None] = give_back_freed_memory
    ) -> None:
        self._resident_bytes = resident_bytes
        self._give_back = give_back
        self._steps = 0
        self._settled = 0

    def after_step(self) -> None:
        """Look, now and then."""
        self._steps += 1
        if self._steps == STEPS_TO_SETTLE:
            self._settled = self._resident_bytes()
        elif self._steps % STEPS_BETWEEN == 0 and self._resident_bytes() > MOST_GROWTH * self._settled:
            self.give_back()

    def give_back(self) -> None:
        """Now: something is over whose pieces had other sizes."""
        self._give_back()
        self._steps = 0
