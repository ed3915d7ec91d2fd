"""Results computed one ahead of their use, in a thread of their own.

    user       ...... uses 0 ......|.... uses 1 ....|
    thread     0 | 1 |             | 2 |            | 3 |

NumPy and PyTorch let other threads run while they compute, so what is prepared this way costs its user little.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

A = TypeVar("A")
R = TypeVar("R")


def ahead_thread() -> ThreadPoolExecutor:
    """The thread for `prefetch`, started now: when memory has run out, one may hang in its start for ever."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="trietune-ahead")
    thread.submit(int).result()
    return thread


def prefetch(
    compute: Callable[[A], R], arguments: Iterable[A], thread: Executor | None = None
) -> Generator[R, None, None]:
    """`compute(argument)` for each argument, in order; while one result is in use, the next is computed.

    `arguments` is read in the caller's thread. What `compute` raises is raised where its result would have come.
    Closing the generator waits for the one that is being computed.

    Args:
        thread: a thread of `ahead_thread`, for several calls one after another; None: one that ends with this call.
    """
    with nullcontext(thread) if thread is not None else ahead_thread() as runner:
        upcoming: Future[R] | None = None
        try:
            for argument in arguments:
                following = runner.submit(compute, argument)
                if upcoming is not None:
                    current, upcoming = upcoming, following
                    yield current.result()
                upcoming = following
            if upcoming is not None:
                yield upcoming.result()
        finally:
            if upcoming is not None and not upcoming.cancel():
                upcoming.exception()
