"""How a run ends: finished, stopped, failed, or not begun because it has finished before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from trietune.errors import EXIT_LOSS_NOT_FINITE, StopRequested, UserError
from trietune.run.result import Run
from trietune.tracking import events

if TYPE_CHECKING:
    from trietune.evaluation.evaluate import Evaluation
    from trietune.run.prepared import Prepared
    from trietune.run.saving import RunFiles
    from trietune.run.stopping import TimedStop
    from trietune.tracking.tracker import Tracker
    from trietune.training.pending_losses import LossNotFiniteError


@dataclass(frozen=True, slots=True)
class Ending:
    """Tells how a run ends, and what is left behind."""

    prepared: Prepared
    tracker: Tracker
    files: RunFiles
    stop: TimedStop

    def already_finished(self, allowed_changes: frozenset[str]) -> Run | None:
        """What an earlier command left behind that finished this run; None if there is something to do."""
        finished = self.files.finished(allowed_changes)
        if finished is None:
            return None
        trained, place = finished
        directory = self.prepared.plan.directory
        self.tracker.info(f"{directory.name} has already finished: its adapter is in {place}; nothing was changed")
        adapter = directory / "adapter"
        return Run(directory, "finished", trained, adapter=adapter if adapter.is_dir() else None)

    def finished(self, step: int, before: Evaluation | None, after: Evaluation | None, *, adapter: Path | None) -> Run:
        """Wait for copies, upload the adapter, and tell how to go on."""
        summary = {f"before/{k}": v for k, v in (before.metrics.items() if before else ())}
        summary.update(after.metrics if after else {})
        run = self.prepared.plan.directory
        commands = [f"trietune report {run}"]
        if adapter is not None:
            commands = [f"trietune predict {run}", f"trietune evaluate {run}", *commands]
        exit_code = self.files.finish_uploads(is_final=True, must_leave=self.stop.must_leave)
        if adapter is not None:
            exit_code = self.files.push_to_hub(adapter) or exit_code
        self._tell("finished", step, summary, commands)
        return Run(
            run,
            "finished",
            step,
            before=dict(before.metrics) if before else {},
            after=dict(after.metrics) if after else {},
            adapter=adapter,
            exit_code=exit_code,
        )

    def stopped(self, stop: StopRequested, step: int, first_step: int) -> Run:
        """What was learned has been saved; no final adapter is written."""
        commands = ["run the same command with `--resume` to continue"] if step > 0 else []
        self.files.finish_uploads(is_final=False, must_leave=self.stop.must_leave)
        self.tracker.info(f"stopped by {stop.signal_name} after step {step:,}")
        if stop.signal_name == "max_time" and step == first_step:
            self.tracker.warn("no step was taken: `max_time` ran out before the first one")
        self._tell("stopped", step, {}, commands)
        return Run(self.prepared.plan.directory, "stopped", step, exit_code=stop.exit_code)

    def failed(self, step: int) -> None:
        self._tell("failed", step, {}, ())

    def _tell(
        self,
        status: Literal["finished", "stopped", "failed"],
        step: int,
        summary: Mapping[str, float],
        commands: Sequence[str],
    ) -> None:
        self.tracker.emit(events.RunFinished(status, step, self.stop.seconds, summary, tuple(commands)))


def raise_not_finite(error: LossNotFiniteError, prepared: Prepared) -> NoReturn:
    """Name the examples of the step whose loss or gradient is not finite."""
    ids = [prepared.data.train.row_id(row) for row in error.sequence_indices]
    shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    what = "loss" if not math.isfinite(error.loss) else "gradient"
    raise UserError(
        f"the {what} of step {error.number} is not finite (loss {error.loss:.4g}, gradient norm {error.grad_norm:.4g})",
        where=f"examples of that step: {shown}",
        next_step="lower `learning_rate`, set `max_grad_norm: 1.0`, or use `dtype: float32`; checkpoints of "
        "earlier steps are whole",
        exit_code=EXIT_LOSS_NOT_FINITE,
    ) from error
