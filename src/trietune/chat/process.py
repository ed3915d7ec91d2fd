"""The process that runs chat templates, and how it is asked.

Jinja's sandbox keeps a template from reaching anything. It does not keep it from looping for years or from doubling a
string until the memory is full, and a single operation of Python's own code can be neither interrupted nor timed from
within. So templates run in another process: it can be left at any moment, it has a memory limit of its own, and it
holds nothing but the conversation that it is asked about.

One line of JSON asks, one line of JSON answers. `{"busy": true}` comes before an answer that takes long, as long as
renderings come to an end.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO

from trietune.chat.conversation import (
    Conversation,
    RefusedError,
    RewrittenTurnError,
    Segment,
    TemplateSource,
    TooSlowError,
)
from trietune.chat.limits import MOST_MEMORY, SECONDS_OF_A_TEMPLATE, SECONDS_UNASKED
from trietune.errors import UserError
from trietune.io.json_types import JsonObject

# Once a template has not come to an end, it is not waited for as long again.
SECONDS_AFTER_THAT = 2.0

_SECONDS_TO_START = 120.0
_SECONDS_BETWEEN_LOOKS = 0.1


def cut(
    conversation: Conversation, source: TemplateSource, *, only_last: bool, check_stop: Callable[[], None]
) -> list[Segment]:
    """`cut_turns`, or with `only_last` `cut_last_turn`, carried out in the process.

    Args:
        check_stop: asked several times a second; what it raises passes through.

    Raises:
        RefusedError: the template cannot render the conversation.
        RewrittenTurnError: it rewrites earlier turns as it continues.
        TooSlowError: it does not come to an end.
        UserError: no process can be started.
    """
    question = {
        "fields": conversation.fields,
        "are_answers": conversation.are_answers,
        "tools": conversation.tools,
        "asks": conversation.asks,
        "only_last": only_last,
    }
    with _lock:
        limit = SECONDS_AFTER_THAT if source.text in _too_slow else SECONDS_OF_A_TEMPLATE
        try:
            try:
                answer = _find_process(check_stop).ask(question, source, limit, check_stop)
            except (BrokenPipeError, _EndedError):  # somebody may have killed it since it was last asked
                answer = _find_process(check_stop).ask(question, source, limit, check_stop)
        except _EndedError:
            reason = f"the chat template takes too long, or needs more than {MOST_MEMORY >> 30} GB of memory"
            raise TooSlowError(reason) from None
        except TooSlowError:
            _too_slow.add(source.text)
            raise
    if "segments" in answer:
        return [(text, is_said) for text, is_said in answer["segments"]]
    raise (RewrittenTurnError if answer["is_rewritten"] else RefusedError)(answer["refused"])


class _EndedError(Exception):
    """The process has ended without an answer."""


_START = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from trietune.chat.server import serve; serve()"


class _Process:
    """A running process of `trietune.chat.server`, ready for questions."""

    def __init__(self, check_stop: Callable[[], None]) -> None:
        self._owner = os.getpid()
        self._asked = time.monotonic()
        self._source: TemplateSource | None = None
        self._read = b""
        try:
            self._popen = subprocess.Popen(  # noqa: S603  (this Python, and nothing of the user's)
                [sys.executable, "-P", "-c", _START, json.dumps(sys.path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                # A Ctrl-C at the terminal is for this process, which ends the other.
                start_new_session=True,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )  # fmt: skip
        except OSError as error:
            raise UserError(
                f"the process that runs chat templates could not be started: {error.strerror or error}",
                next_step="free memory or processes, and try again",
            ) from error
        assert self._popen.stdout is not None
        self._stdout = self._popen.stdout.fileno()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)
        try:
            self._answer(_SECONDS_TO_START, check_stop)
        except BaseException as error:
            self.end()
            if not isinstance(error, (TooSlowError, _EndedError)):
                raise
            raise UserError(
                "the process that runs chat templates does not start",
                next_step="try again when the machine is less busy, or has more memory",
            ) from None

    @property
    def is_ours(self) -> bool:
        """Whether it was started by this process, not by the one that this is a fork of."""
        return self._owner == os.getpid()

    @property
    def can_be_asked(self) -> bool:
        is_about_to_end = time.monotonic() - self._asked > SECONDS_UNASKED / 2
        return self.is_ours and not is_about_to_end and self._popen.poll() is None

    def ask(
        self, question: JsonObject, source: TemplateSource, limit: float, check_stop: Callable[[], None]
    ) -> JsonObject:
        """The answer to a question. If there is none, whatever the reason, the process is ended."""
        check_stop()
        if source != self._source:
            question = {**question, "source": source.text, "special_tokens": source.special_tokens}
        try:
            try:
                line = json.dumps(question).encode() + b"\n"
            except (TypeError, ValueError, RecursionError) as error:
                raise RefusedError(f"no chat template can be given it: {error}") from None
            _write(self._popen.stdin, line)
            self._source = source
            answer = self._answer(limit, check_stop)
            self._asked = time.monotonic()
            return answer
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        self._popen.kill()
        self._popen.wait()
        self._selector.close()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _answer(self, limit: float, check_stop: Callable[[], None]) -> JsonObject:
        while True:
            answer: JsonObject = json.loads(self._line(limit, check_stop))
            if "busy" not in answer:
                return answer

    def _line(self, limit: float, check_stop: Callable[[], None]) -> bytes:
        deadline = time.monotonic() + limit
        parts = [self._read]
        while b"\n" not in parts[-1]:
            check_stop()
            if not self._selector.select(_SECONDS_BETWEEN_LOOKS):
                if time.monotonic() > deadline:
                    raise TooSlowError(f"the chat template has not come to an end after {limit:.0f} s")
                continue
            part = os.read(self._stdout, 1 << 20)
            if not part:
                raise _EndedError
            parts.append(part)
        line, _, self._read = b"".join(parts).partition(b"\n")
        return line


_lock = threading.Lock()
_process: _Process | None = None
_too_slow: set[str] = set()


def _find_process(check_stop: Callable[[], None]) -> _Process:
    global _process
    if _process is not None and not _process.can_be_asked:
        _end_process()
    if _process is None:
        _process = _Process(check_stop)
    return _process


@atexit.register
def _end_process() -> None:
    global _process
    if _process is not None and _process.is_ours:
        _process.end()
    _process = None


def _write(pipe: IO[bytes] | None, line: bytes) -> None:
    assert pipe is not None
    pipe.write(line)
    pipe.flush()
