"""Keep a run's curves with trackio, the local tracker of Hugging Face; needs the package `trackio`."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import trackio

from trietune.tracking.events import Evaluated, Event, RunFinished, RunStarted, StepFinished
from trietune.tracking.jsonl import plain


class TrackioListener:
    """One trackio run in trackio's own folder; `trackio show` opens it."""

    name = "trackio"

    def __init__(self, *, project: str | None, name: str | None = None) -> None:
        self._project = project or "trietune"
        self._run_name = name
        self._run: Any = None

    def handle(self, event: Event) -> None:
        """Log the numbers of `event`. A run of the same name continues where it was."""
        match event:
            case RunStarted():
                with contextlib.redirect_stdout(sys.stderr):  # trackio greets on stdout, which is for results
                    self._run = trackio.init(
                        self._project,
                        name=self._run_name or event.name,
                        config=plain(event.config),
                        resume="allow" if event.first_step else "never",
                        embed=False,
                    )
            case StepFinished() if event.is_logged:
                self._log(event.step, {"epoch": event.epoch, **event.metrics})
            case Evaluated() if event.is_point:
                self._log(event.step, dict(event.metrics))
            case RunFinished():
                self.close()
            case _:
                pass

    def close(self) -> None:
        if self._run is not None:
            self._run = None
            with contextlib.redirect_stdout(sys.stderr):
                trackio.finish()  # type: ignore[no-untyped-call]  # it carries no annotations

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.log({key: value for key, value in values.items() if value is not None}, step=step)
