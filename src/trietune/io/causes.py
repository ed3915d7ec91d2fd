"""What lies behind an error: the errors that led to it, and its first line for a message."""

from __future__ import annotations

from collections.abc import Iterator


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error itself, then what it was raised from or during, as a traceback would show them."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def first_line(error: BaseException) -> str:
    """The first line of its text that is not empty; the name of its type if it has no text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def lacks_threads(error: BaseException) -> bool:
    """Whether the system gave no further thread: a limit of processes or of memory, and nobody's mistake in a file."""
    # Python's words, and those of Rust's pool.
    return any(words in str(error) for words in ("can't start new thread", "ThreadPoolBuildError"))
