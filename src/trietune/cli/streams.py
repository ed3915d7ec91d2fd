"""The three standard streams of a command, whatever the caller did with them.

    stdin closed     an empty one
    stdout closed    `OutputLost` at the first write, as for a full disk
    stderr closed    nothing is shown; a message that nobody can read stops no command

A descriptor that is closed at the start would be given to the next file that is opened, and a library that writes to
"standard error" would write into a run's log. So all three are taken before anything else is opened.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from trietune.errors import EXIT_DONE, EXIT_OUTPUT_LOST
from trietune.tracking.terminal import write_text


class OutputLost(Exception):  # noqa: N818  (a state of the reader, not a failure of ours)
    """Standard output took nothing more; `number` is the errno. No OSError, so that nobody takes it for a file's."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number


class _Strict(io.FileIO):
    """Standard output: what it refuses is `OutputLost`.

    Attributes:
        was_closed: before we began; the descriptor then is one of ours, and everything is refused.
        is_over: it was said that output is lost, and what still comes is dropped.
    """

    was_closed = False
    is_over = False

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        if self.is_over:
            return len(data)
        if self.was_closed:
            raise OutputLost(errno.EBADF)
        try:
            return _write(super().write, self.fileno(), data)
        except OSError as error:
            raise OutputLost(error.errno or errno.EIO) from error


class _Lenient(io.FileIO):
    """Standard error: what it refuses is forgotten."""

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        try:
            return _write(super().write, self.fileno(), data)
        except OSError:
            return len(data)


def guard_streams() -> None:
    """Take the standard streams of this process in hand."""
    was_closed = [_is_closed(number) for number in range(3)]
    for number, is_closed in enumerate(was_closed):
        if is_closed:
            descriptor = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            else:
                os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  (for as long as the process)
    raw = _Strict(1, "w", closefd=False)
    raw.was_closed = was_closed[1]
    sys.stdout = _text(raw, sys.stdout, "strict")
    sys.stderr = _text(_Lenient(2, "w", closefd=False), sys.stderr, "backslashreplace")


def end_streams(code: int) -> int:
    """Write what still waits, and return the exit code: `code`, or that of lost output where it would have been 0."""
    try:
        sys.stdout.flush()
    except OutputLost as lost:
        code = code or exit_code_of(lost)
        _forget(sys.stdout)
    except (OSError, ValueError):  # not one of ours: a caller has put another stream there
        _forget(sys.stdout)
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        _forget(sys.stderr)
    return code


def exit_code_of(lost: OutputLost) -> int:
    """Of a command that did all but print; said on stderr, except of a reader that left, as `| head` does."""
    if lost.number == errno.EPIPE:
        return EXIT_DONE
    reason = "it is closed" if lost.number == errno.EBADF else lost
    write_text(sys.stderr, f"error: standard output could not be written: {reason}\n")
    return EXIT_OUTPUT_LOST


@contextmanager
def verdict(code: int) -> Iterator[None]:
    """Print inside; the command then ends with `code`, the verdict, whether or not it could be printed."""
    try:
        yield
        sys.stdout.flush()
    except OutputLost as lost:
        if not code:
            raise
        exit_code_of(lost)
        _forget(sys.stdout)
    if code:
        raise SystemExit(code)


def _write(write: object, descriptor: int, data: bytes | memoryview) -> int:
    while True:
        written = write(data)  # type: ignore[operator]
        if written is not None:
            return int(written)
        select.select([], [descriptor], [])  # a pipe that does not wait for its reader; we do


def _is_closed(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError as error:
        return error.errno == errno.EBADF
    return False


def _text(raw: io.RawIOBase, before: TextIO | None, errors: str) -> TextIO:
    encoding = getattr(before, "encoding", None) or "utf-8"
    errors = getattr(before, "errors", None) or errors
    is_line_buffered = errors == "backslashreplace" or raw.isatty()
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=is_line_buffered)


def _forget(stream: TextIO) -> None:
    """Let the interpreter's end write what still waits to nowhere; it would fail there, and end with 120."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    if isinstance(raw, _Strict):
        raw.is_over = True
        return
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
