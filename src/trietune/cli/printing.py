"""How commands print: text for people, JSON for programs, events on the console."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from trietune.io.json_types import JsonObject

if TYPE_CHECKING:
    from trietune.tracking.tracker import Tracker

JSON_VERSION = 1


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Text for people, on stdout or stderr."""
    from trietune.tracking.terminal import write_text

    write_text(sys.stderr if err else sys.stdout, f"{text}\n" if nl else text)


def say_line(text: str, *, err: bool = False) -> None:
    """One line for people: what is in it, such as the name of a file, makes no second one."""
    from trietune.tracking import wording

    say("\t".join(map(wording.line, text.split("\t"))), err=err)


def print_json(document: JsonObject) -> None:
    print_json_line({"schema_version": JSON_VERSION, **document})


def print_json_line(record: JsonObject) -> None:
    from trietune.tracking.terminal import write_json

    write_json(sys.stdout, record)


@contextmanager
def console() -> Iterator[Tracker]:
    """A tracker that only writes to the console, closed at the end."""
    from trietune.tracking.open import open_tracker

    with closing(open_tracker(tracker="none", writes_files=False)) as tracker:
        yield tracker
