"""`trietune sweep`: a grid of trainings, ending in one comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from trietune.errors import EXIT_DONE
from trietune.run.sweep import (
    Outcome,
    Sweep,
    SweepStopped,
    comparison_table,
    plan_sweep,
    run_trials,
    write_comparison,
)


def sweep_command(
    config: Path | None,
    over: Sequence[str],
    overrides: Sequence[str],
    *,
    address: str | None,
    use_ray: bool,
    cpus_per_trial: int,
    say: Callable[[str], None],
    show: Callable[[str], None],
) -> int:
    """Train all trials and compare them; returns the exit code of the first one that failed.

    Args:
        use_ray: whether trials are tasks of a Ray cluster, the one at `address` or one of this machine.
        say: told what happens.
        show: told the result.
    """
    sweep = plan_sweep(config, over, overrides)
    say(f"{len(sweep.trials)} trials in {sweep.directory}")
    try:
        outcomes = _run(sweep, address, use_ray, cpus_per_trial, say)
    except SweepStopped as stopped:
        say(f"stopped after {stopped.num_done} of {stopped.num_trials} trials\nnext:  run the same command to continue")
        return stopped.exit_code
    return _compare(sweep, outcomes, say, show)


def _run(
    sweep: Sweep, address: str | None, use_ray: bool, cpus_per_trial: int, say: Callable[[str], None]
) -> list[Outcome]:
    if not use_ray:
        return run_trials(sweep, say)
    from trietune.run.sweep_on_ray import run_trials_on_ray

    return run_trials_on_ray(sweep, address=address, cpus_per_trial=cpus_per_trial, say=say)


def _compare(sweep: Sweep, outcomes: Sequence[Outcome], say: Callable[[str], None], show: Callable[[str], None]) -> int:
    from trietune.io.columns import columns

    for line in columns(comparison_table(sweep, outcomes)):
        show(line)
    page = write_comparison(sweep, outcomes)
    if page is not None:
        show(str(page))
    failed = [outcome for outcome in outcomes if outcome.exit_code != EXIT_DONE]
    if failed:
        names = ", ".join(f"`{outcome.trial.name}`" for outcome in failed)
        say(f"error: {len(failed)} of {len(outcomes)} trials did not end well: {names}")
        say("next:  the same command tries them again; those that have finished are not trained twice")
        return failed[0].exit_code
    return EXIT_DONE
