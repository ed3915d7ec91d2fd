"""`trietune train`: the settings, the plan alone, a training, or the processes that share one."""

from __future__ import annotations

import functools
import logging
import sys
import time
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from trietune.cli.options import MaybePath, MaybeText, Overrides
from trietune.cli.printing import console, print_json, say, say_line
from trietune.cli.settings import settings_to_train
from trietune.errors import UserError
from trietune.ranks.launched import command_began, refuse_several_processes

if TYPE_CHECKING:
    from trietune.config.settings import Settings


def train(
    context: typer.Context,
    config: Annotated[MaybePath, typer.Argument(help="YAML file; without one, the sample model and data.")] = None,
    overrides: Overrides = [],  # noqa: B006  (typer copies it)
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the newest checkpoint, if there is one.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print each value and where it comes from.")
    ] = False,
    allow_change: Annotated[
        list[str],
        typer.Option("--allow-change", metavar="KEY", help="Accept a difference, or `optimizer_state`, when resuming."),
    ] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: the plan as JSON.")] = False,
    nproc: Annotated[
        MaybeText,
        typer.Option("--nproc", metavar="N|auto", help="Processes on this machine that share each step."),
    ] = None,
    restarts: Annotated[
        int, typer.Option("--restarts", min=0, help="With --nproc or --ray: restarts after a lost process.")
    ] = 0,
    use_ray: Annotated[bool, typer.Option("--ray", help="Train with the workers of a Ray cluster.")] = False,
    num_workers: Annotated[
        MaybeText,
        typer.Option("--num-workers", metavar="N|MIN,MAX", help="With --ray: workers; with a range it may shrink."),
    ] = None,
    cpus_per_worker: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--cpus-per-worker", min=1, help="With --ray: cores of each worker."),
    ] = None,
    address: Annotated[
        MaybeText, typer.Option("--address", help="With --ray: a cluster that runs; default: one of this machine.")
    ] = None,
) -> None:
    """Train an adapter: from a YAML file, from `--model` and `--data`, or as a sample run."""
    from trietune.config import show_config as describe

    if resume:
        overrides = [*overrides, "resume_from_checkpoint=auto"]
    settings = settings_to_train(config, overrides)
    if show_config:
        say(describe(settings))
        return
    if restarts and nproc is None and not use_ray:
        raise UserError("`--restarts` needs `--nproc` or `--ray`", next_step="--nproc 2 --restarts 3")
    given = {"--num-workers": num_workers, "--cpus-per-worker": cpus_per_worker, "--address": address}
    for option, value in given.items():
        if value is not None and not use_ray:
            raise UserError(f"`{option}` is for `--ray`", next_step=f"--ray {option} {value}")
    if use_ray and nproc is not None:
        raise UserError("`--nproc` and `--ray` both start processes", next_step="--ray --num-workers N")
    count = _number_of_processes(nproc)
    workers = None
    if use_ray:
        from trietune.run.on_ray import read_workers

        refuse_several_processes()
        workers = read_workers(num_workers, cpus_per_worker)
        count = workers.most if workers else 1
    if dry_run:
        _print_plan(settings, prints_json=as_json, num_processes=count)
        return
    to_stderr = functools.partial(say, err=True)
    if use_ray:
        from trietune.run.on_ray import train_on_ray

        _set_log_level(settings.log_level)
        raise typer.Exit(
            train_on_ray(
                settings,
                workers=workers,
                address=address,
                restarts=restarts,
                allowed_changes=frozenset(allow_change),
                began=_began_of(context),
                say=to_stderr,
            )
        )
    if count > 1:
        from trietune.ranks.launch import launch

        options = [f"--set={override}" for override in overrides]
        options += [f"--allow-change={key}" for key in allow_change]
        if restarts and not settings.resume_from_checkpoint:
            from trietune.run.plan import run_directory

            # The folder of the first attempt, by name: `--resume` would take an older run's, where this one is `-2`.
            options.append(f"--set=wandb_run_name={run_directory(settings).name}")
        command = [sys.executable, "-m", "trietune", "train", *([] if config is None else [str(config)]), *options]
        raise typer.Exit(launch(command, count, restarts=restarts, began=_began_of(context), say=to_stderr))
    _set_log_level(settings.log_level)
    from trietune.run.train import train as run_training

    began = command_began() or _began_of(context)
    raise typer.Exit(run_training(settings, allowed_changes=frozenset(allow_change), began=began).exit_code)


def _began_of(context: typer.Context) -> float:
    """When the command began, by `time.monotonic`: `max_time` counts from there."""
    return context.obj if isinstance(context.obj, float) else time.monotonic()


def _number_of_processes(nproc: str | None) -> int:
    """What `--nproc` asks for; `auto` is one process for each CUDA device, said."""
    if nproc is None:
        return 1
    refuse_several_processes()
    if nproc == "auto":
        import torch

        found = torch.cuda.device_count()
        say(
            f"--nproc auto: {found} processes, one for each CUDA device"
            if found > 1
            else f"--nproc auto: one process ({found or 'no'} CUDA device{'' if found else 's'} here)",
            err=True,
        )
        return max(found, 1)
    if not nproc.isdecimal() or int(nproc) < 1:
        raise UserError(f"`--nproc {nproc}` is not a number of processes", next_step="--nproc 2   (or --nproc auto)")
    return int(nproc)


def _print_plan(settings: Settings, *, prints_json: bool, num_processes: int = 1) -> None:
    from trietune.cli.look import as_json, look_at
    from trietune.io.columns import columns
    from trietune.ranks.launch import as_one_of
    from trietune.run.prepare import prepare
    from trietune.run.signals import StopSignals

    refuse_several_processes()
    with console() as tracker, StopSignals() as signals, as_one_of(num_processes):
        prepared = prepare(settings, tracker, signals.check, num_processes=num_processes)
    shown = look_at(prepared)
    if prints_json:
        print_json(
            {
                "plan": dict(prepared.plan.lines()),
                "num_steps": prepared.plan.num_steps,
                "left_out": shown.left_out,
                "examples": [as_json(preview) for preview in shown.examples],
                "longest": None if shown.longest is None else as_json(shown.longest),
            }
        )
        return
    for line in [*columns(prepared.plan.lines()), *shown.lines()]:
        say_line(line)


def _set_log_level(level: str) -> None:
    from trietune.tracking.terminal import VisibleFormatter, make_warnings_visible

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(VisibleFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    make_warnings_visible()
    logging.getLogger("trietune").setLevel(level)
