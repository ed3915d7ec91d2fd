"""Errors that a person can act on: what is wrong, where, and what to do next."""

from __future__ import annotations

import re

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USER_ERROR = 2
EXIT_UPLOAD_INCOMPLETE = 3
EXIT_THRESHOLD_MISSED = 4
EXIT_LOSS_NOT_FINITE = 5
EXIT_RESUME_REFUSED = 6
EXIT_RANK_LOST = 7
EXIT_OUTPUT_LOST = 8
EXIT_SIGINT = 130
EXIT_SIGUSR1 = 138
EXIT_SIGTERM = 143


class UserError(Exception):
    """A mistake that the user can mend; printed without a traceback by `trietune.cli.app`.

    Args:
        what: one sentence in plain words, in backticks whatever the user typed.
        where: file and line, key, or example that it comes from; None when `what` says it.
        next_step: what to do now, with a command or a value to write where there is one.
        exit_code: exit code of the process; see the constants above.
    """

    def __init__(
        self, what: str, *, where: str | None = None, next_step: str | None = None, exit_code: int = EXIT_USER_ERROR
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.next_step = next_step
        self.exit_code = exit_code

    def __str__(self) -> str:
        """The message as the command line prints it, two or three lines, each part where the eye expects it."""
        lines = [f"error: {self.what}"]
        if self.where:
            lines.append(f"       {self.where}")
        if self.next_step:
            lines.append(f"next:  {self.next_step}")
        # A name with a line break in it must not look like a line of ours; what we break ourselves is indented.
        return "\n".join(re.sub(r"\r?\n(?! {7})", r"\\n", line) for line in lines)


class StopRequested(Exception):  # noqa: N818  (a request, not a failure)
    """Raised at a point where it is safe to leave, after a signal; carries the exit code of that signal."""

    def __init__(self, signal_name: str, exit_code: int) -> None:
        super().__init__(signal_name)
        self.signal_name = signal_name
        self.exit_code = exit_code


def in_short(text: str, most: int = 80) -> str:
    """At most so many characters: both ends of a longer text, for a path says most with its last part."""
    end = (most - 3) // 2
    return text if len(text) <= most else f"{text[: most - 3 - end]}...{text[-end:]}"
