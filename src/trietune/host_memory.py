"""Memory that a training process frees stays its own, so that the next step does not ask the system for it again.

A step frees and takes hundreds of megabytes in pieces of some megabytes. The C library hands such pieces back to the
system at once, and every page of the next piece then costs a page fault: some 5 % of a step on two cores. No torch
here: the settings must be there before its first allocation.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import MutableMapping

# From <malloc.h> of glibc.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
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
