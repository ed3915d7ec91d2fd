"""A training from its settings: what surrounds the run, so that all of it ends whatever happens.

settings -> prepare (plan, data, base model) -> session: evaluate, train, save, evaluate -> Run
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from trietune.checkpoints.lock import RunLock
from trietune.checkpoints.probe import check_place
from trietune.errors import UserError
from trietune.ranks.opening import open_ranks
from trietune.run.folder import RunFolder, locked_folder
from trietune.run.malloc import give_back_freed_memory, hand_back_freed_memory, keep_freed_memory
from trietune.run.plan import run_directory
from trietune.run.prepare import prepare_together
from trietune.run.result import Run
from trietune.run.signals import StopSignals
from trietune.run.stopping import TimedStop
from trietune.tracking.open import open_tracker
from trietune.tracking.tracker import Tracker

if TYPE_CHECKING:
    from trietune.config.settings import Settings


def train(
    settings: Settings,
    *,
    tracker: Tracker | None = None,
    allowed_changes: frozenset[str] = frozenset(),
    began: float | None = None,
    in_python: bool = False,
    followers: Tracker | None = None,
    signals: StopSignals | None = None,
    on_lost: Callable[[UserError], None] | None = None,
) -> Run:
    """Train the adapter that `settings` describe; of several processes that a launcher started, each its part.

    Args:
        tracker: who hears of the run's events; by default its files, the console, and the tracker that the settings
            name.
        allowed_changes: keys that may differ from those of the checkpoint that is resumed.
        began: when the command began, as `time.monotonic` tells it, for `max_time`; None: now.
        in_python: whether what to do next is said in Python's words.
        followers: who hears of the events of other processes than the first; by default nobody.
        signals: what asks to stop; by default the signals of this process.
        on_lost: told which process was lost, and ends this one; by default the sentence is printed.

    Raises:
        UserError: a mistake in settings or data, a loss that is not finite, a resume that was refused, or a process
            that was lost.
        StopRequested: a signal came before there was anything to save.
    """
    began = time.monotonic() if began is None else began
    with ExitStack() as stack:
        if settings.parallelism_strategy == "fsdp":
            hand_back_freed_memory()
        elif keep_freed_memory():
            stack.callback(give_back_freed_memory)
        signals = stack.enter_context(signals or StopSignals())
        ranks = open_ranks(may_use_cuda=settings.device in ("auto", "cuda"), on_lost=on_lost, check=signals.check)
        stack.callback(ranks.close)
        listeners = ranks.first_of(
            lambda: tracker or _open_tracker(settings, in_python=in_python), lambda: followers or Tracker()
        )
        stack.callback(listeners.close)
        stop = TimedStop(signals, settings.max_time, began)
        ranks.once(lambda: check_place(run_directory(settings), where=settings.where("project_dir")))
        prepared = prepare_together(settings, listeners, stop.check, ranks)
        # Now that the device has been chosen: transformers starts XLA devices when it is imported.
        from trietune.run.session import run_session

        locks: list[RunLock] = []
        # Rank 0 holds the folder for all.
        ranks.once(lambda: locks.append(stack.enter_context(locked_folder(prepared.plan.directory))))
        folder = RunFolder(prepared.plan.directory, locks[0] if locks else None)
        return run_session(prepared, listeners, ranks, folder, stop, allowed_changes)


def _open_tracker(settings: Settings, *, in_python: bool) -> Tracker:
    return open_tracker(
        tracker=settings.tracker,
        use_wandb=settings.use_wandb,
        project=settings.wandb_project,
        run_name=settings.wandb_run_name,
        tags=settings.wandb_tags,
        model_to_wandb=settings.model_to_wandb,
        in_python=in_python,
    )
