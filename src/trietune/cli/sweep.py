"""`trietune sweep`: a grid of trainings, ending in one comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from trietune.cli.options import MaybePath, MaybeText, Overrides
from trietune.cli.printing import say
from trietune.errors import EXIT_DONE, UserError
from trietune.ranks.launched import refuse_several_processes

if TYPE_CHECKING:
    from trietune.run.sweep import Outcome, Sweep


def sweep(
    config: Annotated[MaybePath, typer.Argument(help="YAML file; without one, the sample model and data.")] = None,
    over: Annotated[
        list[str], typer.Option("--over", metavar="KEY=A,B", help="Values of a key to try; may be repeated.")
    ] = [],  # noqa: B006
    overrides: Overrides = [],  # noqa: B006
    use_ray: Annotated[bool, typer.Option("--ray", help="Trials are tasks of a Ray cluster.")] = False,
    address: Annotated[
        MaybeText, typer.Option("--address", help="With --ray: a cluster that runs; default: one of this machine.")
    ] = None,
    cpus_per_trial: Annotated[int, typer.Option(min=1, help="With --ray: cores of each trial.")] = 1,
) -> None:
    """Train a grid of settings, one run a trial, and compare them."""
    from trietune.demo import demo_config
    from trietune.run.sweep import SweepStopped, plan_sweep  # loads pydantic

    refuse_several_processes()
    if address is not None and not use_ray:
        raise UserError("`--address` is for `--ray`", next_step=f"--ray --address {address}")
    planned = plan_sweep(config or demo_config(), over, overrides)
    tell(f"{len(planned.trials)} trials in {planned.directory}")
    try:
        outcomes = _run(planned, address, cpus_per_trial, use_ray=use_ray)
    except SweepStopped as stopped:
        tell(f"stopped after {stopped.num_done} of {stopped.num_trials} trials")
        tell("next:  run the same command to continue")
        raise typer.Exit(stopped.exit_code) from None
    raise typer.Exit(_compare(planned, outcomes))


def _run(planned: Sweep, address: str | None, cpus_per_trial: int, *, use_ray: bool) -> list[Outcome]:
    if not use_ray:
        from trietune.run.sweep import run_trials

        return run_trials(planned, tell)
    from trietune.run.sweep_on_ray import run_trials_on_ray

    return run_trials_on_ray(planned, address=address, cpus_per_trial=cpus_per_trial, say=tell)


def _compare(planned: Sweep, outcomes: Sequence[Outcome]) -> int:
    """Show the comparison; returns the exit code of the first trial that failed."""
    from trietune.io.columns import columns
    from trietune.run.sweep import comparison_table, write_comparison

    for line in columns(comparison_table(planned, outcomes)):
        say(line)
    page = write_comparison(planned, outcomes)
    if page is not None:
        say(str(page))
    failed = [outcome for outcome in outcomes if outcome.exit_code != EXIT_DONE]
    if failed:
        names = ", ".join(f"`{outcome.trial.title}`" for outcome in failed)
        tell(f"error: {len(failed)} of {len(outcomes)} trials did not end well: {names}")
        tell("next:  the same command tries them again; those that have finished are not trained twice")
        return failed[0].exit_code
    return EXIT_DONE


def tell(text: str) -> None:
    """What happens, beside the result."""
    say(text, err=True)
