"""What is wrong with a configuration, collected, so that one run of the program names all of it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from trietune.errors import UserError


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to correct.

    Args:
        what: the sentence that names key, value and place.
        why: what is allowed, or what the key is for, in one or more lines; None where `what` says it all.
        remedy: what to write.
        keys: the keys that it is about, so that a contradiction is not reported of a value that is wrong by itself.
    """

    what: str
    why: str | None
    remedy: str
    keys: tuple[str, ...] = ()

    @property
    def line(self) -> float:
        """The first line that it names, to report problems in the order of the file; others come last."""
        found = re.search(r", line (\d+)", self.what)
        return int(found.group(1)) if found else math.inf


def as_user_error(problems: Sequence[Problem], *, source: str | None, command: str) -> UserError:
    """One problem in the usual three lines; several as a list under one heading.

    Args:
        source: the file that they were found in, for the heading.
        command: shows what would run, once they are corrected.
    """
    if len(problems) == 1:
        problem = problems[0]
        why = problem.why.replace("\n", "\n       ") if problem.why else None
        return UserError(problem.what, where=why, next_step=f"{problem.remedy}; {command} shows what would run")
    blocks = []
    for number, problem in enumerate(problems, start=1):
        lines = [problem.what, *(problem.why.split("\n") if problem.why else ()), problem.remedy]
        lead = f"{number}. "
        blocks.append(lead + f"\n       {' ' * len(lead)}".join(lines))
    heading, text = f"{len(problems)} things to correct", "\n       ".join(blocks)
    if source:
        heading, text = f"{heading} in {source}", text.replace(f"{source}, line ", "line ")
    return UserError(heading, where=text, next_step=f"correct them; {command} shows what would run")
