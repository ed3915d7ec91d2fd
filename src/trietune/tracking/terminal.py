"""The one place from which text reaches a terminal, or whatever stands in its place.

What a person reads here comes from files of others: labels, columns, names of files and tensors, answers of a model.
Control characters in it would move the cursor, rename the window, or hide a line; they are written out instead.
"""

from __future__ import annotations

import json
import logging
import unicodedata
import warnings
from collections.abc import Callable
from typing import TextIO

from trietune.io.json_types import JsonObject
from trietune.tracking.jsonl import plain
from trietune.tracking.wording import visible


def write_text(stream: TextIO, text: str) -> None:
    """Write text for people and flush, whatever is in it and whatever the stream's encoding; tabs stay."""
    stream.write(encodable(stream, "\t".join(map(visible, text.split("\t")))))
    stream.flush()


def write_json(stream: TextIO, record: JsonObject) -> None:
    """Write `record` as one line of strict JSON and flush, control characters escaped as JSON does."""
    text = json.dumps(plain(record), ensure_ascii=False, allow_nan=False)
    if not text.isprintable():
        text = "".join(json.dumps(char)[1:-1] if _is_control(char) else char for char in text)
    stream.write(encodable(stream, text, json_escapes=True) + "\n")
    stream.flush()


def can_encode(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def encodable(stream: TextIO, text: str, *, json_escapes: bool = False) -> str:
    """`text` with escapes for the characters that the stream's encoding lacks; writing them would fail."""
    if can_encode(stream, text):
        return text
    if json_escapes:
        return "".join(char if can_encode(stream, char) else json.dumps(char)[1:-1] for char in text)
    return text.encode(stream.encoding, "backslashreplace").decode(stream.encoding)


class VisibleFormatter(logging.Formatter):
    """A log record as a line without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def make_warnings_visible() -> None:
    """Let Python's warnings, which quote names from files, pass without control characters; once is enough."""
    known: Callable[..., str] = warnings.formatwarning
    if getattr(known, "is_visible", False):
        return

    def formatted(*args: object, **kwargs: object) -> str:
        return visible(known(*args, **kwargs))

    formatted.is_visible = True  # type: ignore[attr-defined]
    warnings.formatwarning = formatted


def _is_control(char: str) -> bool:
    return unicodedata.category(char).startswith("C")
