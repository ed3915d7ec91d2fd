"""Patterns over the names of a model's modules, which end in good time, whatever they say.

Python's own matcher needs longer than anybody lives for `(.|.)*X` on a name of sixty letters, and cannot be stopped.
So patterns are in Python's syntax, are matched by `regex` under a time limit, once over all names, and what
leaves here are names.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Sequence
from typing import Any

import regex

MAX_LETTERS = 4096
# All names of a large model take a few milliseconds.
SECONDS = 2.0
# Read otherwise by `regex` than by Python: an inexact repeat, and a class of characters within a class.
_OTHER_SYNTAX = re.compile(r"\{(?!\d*,?\d*\})|\[\[:")


class PatternError(ValueError):
    """A pattern cannot be used; the message ends a sentence about it."""


def matching(pattern: str, names: Sequence[str], *, whole: bool = True, seconds: float = SECONDS) -> list[str]:
    """The names that match, in their order.

    Args:
        pattern: in the syntax of `re`, look-ahead included.
        whole: whether the pattern must match the whole name, as `re.fullmatch`; else any part of it, as `re.search`.
        seconds: for all names together.

    Raises:
        PatternError: no pattern, too long, or out of time.
    """
    return [name for name, _ in matches(pattern, names, whole=whole, seconds=seconds)]


def matches(
    pattern: str, names: Sequence[str], *, whole: bool = True, seconds: float = SECONDS
) -> list[tuple[str, dict[str, Any]]]:
    """`matching`, with the named groups of each match."""
    compiled = compile_pattern(pattern)
    match = compiled.fullmatch if whole else compiled.search
    end, found = time.monotonic() + seconds, []
    for name in names:
        try:
            one = match(name, timeout=max(end - time.monotonic(), 1e-3))
        except TimeoutError:
            raise PatternError(f"takes longer than {seconds:g} seconds to match") from None
        except (RecursionError, MemoryError):
            raise PatternError("is too deep to match") from None
        if one is not None:
            found.append((name, one.groupdict()))
    return found


def compile_pattern(pattern: str) -> Any:
    """The pattern of `regex`. Raises `PatternError` for what is none to Python, or another one."""
    if len(pattern) > MAX_LETTERS:
        raise PatternError(f"has {len(pattern):,} letters, more than the {MAX_LETTERS:,} allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
            if _OTHER_SYNTAX.search(pattern):
                raise PatternError(
                    "has a brace or `[[:`, which no module's name has; write `\\\\{` for the letter itself"
                )
            return regex.compile(pattern, flags=regex.VERSION0)
    except PatternError:
        raise
    except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
        raise PatternError(f"is not a pattern: {error}") from error
