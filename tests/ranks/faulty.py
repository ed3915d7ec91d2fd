"""`trietune`, with one fault: the process of rank FAULTY_RANK meets it at step FAULTY_STEP, once.

kill    SIGKILL to itself            sleep   computes for ever
stop    SIGSTOP to itself            raise   a bug
fill    the disk of the run's folder is full from here on

Started by the product's own launcher or by torchrun in place of `-m trietune`. The file FAULTY_MARK says when.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from trietune.cli.app import main
from trietune.training import loop


def meet_fault(kind: str, mark: Path) -> None:
    mark.write_text(repr(time.time()))
    match kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep":
            time.sleep(3600)
        case "raise":
            raise ValueError("a bug in one process")
        case "fill":
            with contextlib.suppress(OSError), (Path(os.environ["FAULTY_DISK"]) / "filler").open("wb") as file:
                while True:
                    file.write(b"\0" * 4096)
                    file.flush()


def install() -> None:
    kind, mark = os.environ["FAULTY_FAULT"], Path(os.environ["FAULTY_MARK"])
    rank, step = os.environ["FAULTY_RANK"], int(os.environ["FAULTY_STEP"])
    take = loop._Stepper.step

    def take_or_fail(self: Any, layout: Any) -> Any:
        if os.environ.get("RANK", "0") == rank and layout.number + 1 == step and not mark.exists():
            meet_fault(kind, mark)
        return take(self, layout)

    loop._Stepper.step = take_or_fail  # type: ignore[method-assign]


if __name__ == "__main__":
    install()
    sys.exit(main())
