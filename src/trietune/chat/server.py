"""What runs in the process of chat templates: it answers questions, a line each, until there are no more."""

from __future__ import annotations

import json
import os
import resource
import selectors
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from trietune.chat.conversation import Conversation, RefusedError, RewrittenTurnError
from trietune.chat.limits import MOST_MEMORY, SECONDS_OF_A_TEMPLATE, SECONDS_UNASKED
from trietune.chat.template import ChatTemplate
from trietune.chat.turns import cut_last_turn, cut_turns
from trietune.io.json_types import JsonObject

_SECONDS_BETWEEN_SIGNS = 1.0


class _Server:
    """Answers questions with the template that came last."""

    def __init__(self, answers: IO[bytes]) -> None:
        self._answers = answers
        self._template = ChatTemplate("", {})
        self._last_sign = time.monotonic()

    def write(self, answer: JsonObject) -> None:
        self._answers.write(json.dumps(answer).encode() + b"\n")
        self._answers.flush()

    def answer(self, line: bytes) -> None:
        _limit_time()
        self._last_sign = time.monotonic()
        question = json.loads(line)
        if "source" in question:
            self._template = ChatTemplate(question["source"], question["special_tokens"], self._tell)
        self.write(self._cut(question))

    def _cut(self, question: JsonObject) -> JsonObject:
        conversation = Conversation(**{name: question[name] for name in ("fields", "are_answers", "tools", "asks")})
        try:
            segments = (cut_last_turn if question["only_last"] else cut_turns)(conversation, self._template)
        except RefusedError as error:
            return _refusal(str(error), is_rewritten=isinstance(error, RewrittenTurnError))
        except MemoryError:
            return _refusal(f"the chat template needs more than {MOST_MEMORY >> 30} GB of memory")
        except Exception as error:  # tools that are nested too deep, calls of none of the known forms
            return _refusal(f"the chat template refuses it: {type(error).__name__}: {str(error)[:500]}")
        return {"segments": segments}

    def _tell(self) -> None:
        """A rendering has come to an end: whoever waits may wait on."""
        if time.monotonic() - self._last_sign > _SECONDS_BETWEEN_SIGNS:
            self._last_sign = time.monotonic()
            _limit_time()
            self.write({"busy": True})


def serve() -> None:
    """Answer the questions of standard input, until it ends or nobody asks any more."""
    answers = os.fdopen(os.dup(1), "wb")
    # What a library prints must not be taken for an answer.
    os.dup2(2, 1)
    _limit(resource.RLIMIT_AS, _mapped() + MOST_MEMORY)
    server = _Server(answers)
    server.write({"is_ready": True})
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin.buffer, selectors.EVENT_READ)
        while selector.select(SECONDS_UNASKED) and (line := sys.stdin.buffer.readline()):
            server.answer(line)


def _refusal(reason: str, *, is_rewritten: bool = False) -> JsonObject:
    return {"refused": reason, "is_rewritten": is_rewritten}


def _mapped() -> int:
    """Bytes of addresses that the libraries have taken, whether or not there is memory behind them."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _limit_time() -> None:
    """Should whoever asked be killed, this process does not go on for ever."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + 3 * SECONDS_OF_A_TEMPLATE))


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    with suppress(ValueError, OSError):  # systems without this limit
        resource.setrlimit(kind, (most, hard))
