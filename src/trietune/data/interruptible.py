"""Run a program of somebody else's, a chat template, so that it can be left: when it takes too long, or at a signal.

Jinja's sandbox keeps a template from reaching anything, not from looping for years. One thread watches; it raises an
exception in the thread that renders, between two of its instructions.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SECONDS_BETWEEN_LOOKS = 0.1
# A watcher with nothing to watch ends, and the next call starts another.
_LOOKS_BEFORE_IT_ENDS = 100


class TookTooLong(BaseException):
    """What runs in `interruptible` was interrupted."""


@dataclass(slots=True, eq=False)
class _Watched:
    thread: int
    deadline: float
    is_wanted: Callable[[], bool]
    was_interrupted: bool = False


_lock = threading.Lock()
_watched: set[_Watched] = set()
_watcher: tuple[int, threading.Thread] | None = None


@contextmanager
def interruptible(seconds: float, is_wanted: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Raise `TookTooLong` in the block after `seconds`, or soon after `is_wanted` says no."""
    mine = _Watched(threading.get_ident(), time.monotonic() + seconds, is_wanted)
    try:
        with _lock:
            _watched.add(mine)
            _start_watcher()
        yield
    finally:
        with _lock:
            _watched.discard(mine)
        if mine.was_interrupted:
            _absorb()


def _absorb() -> None:
    """Let an exception that is still on its way to this thread arrive here, not in whatever comes next."""
    try:
        for _ in range(1000):
            pass
    except TookTooLong:
        return


def _start_watcher() -> None:
    global _watcher
    if _watcher is not None and _watcher[0] == os.getpid() and _watcher[1].is_alive():
        return
    thread = threading.Thread(target=_watch, name="templates", daemon=True)
    _watcher = (os.getpid(), thread)
    thread.start()


def _watch() -> None:
    global _watcher
    idle = 0
    while True:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        with _lock:
            idle = 0 if _watched else idle + 1
            if idle > _LOOKS_BEFORE_IT_ENDS:
                _watcher = None
                return
            now = time.monotonic()
            for one in _watched:
                if not one.was_interrupted and (now > one.deadline or not one.is_wanted()):
                    one.was_interrupted = True
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(one.thread), ctypes.py_object(TookTooLong)
                    )
