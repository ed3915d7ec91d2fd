"""Results computed one ahead of their use, in a thread of their own.

    user       ...... uses 0 ......|.... uses 1 ....|
    thread     0 | 1 |             | 2 |            | 3 |

NumPy and PyTorch let other threads run while they compute, so what is prepared this way costs its user little.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
R = TypeVar("R")


def one_ahead(compute: Callable[[A], R], arguments: Iterable[A]) -> Generator[R, None, None]:
    """`compute(argument)` for each argument, in order; while one result is in use, the next is computed.

    `arguments` is read in the caller's thread. What `compute` raises is raised where its result would have come.
    Closing the generator waits for the one that is being computed, and ends the thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="trietune-ahead") as thread:
        upcoming: Future[R] | None = None
        for argument in arguments:
            following = thread.submit(compute, argument)
            if upcoming is not None:
                yield upcoming.result()
            upcoming = following
        if upcoming is not None:
            yield upcoming.result()
