"""The commands: read arguments, call, print, set the exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

from trietune.errors import EXIT_BUG, EXIT_DONE, StopRequested, UserError

app = typer.Typer(
    name="trietune",
    help="Exact LoRA fine-tuning that computes every shared prefix once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Optional[Path], typer.Argument(help="YAML file; without one, the sample model and data.")]  # noqa: UP045
Overrides = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Exact LoRA fine-tuning that computes every shared prefix once."""
    if version:
        import trietune

        typer.echo(trietune.__version__)
        raise typer.Exit


@app.command()
def train(
    config: ConfigFile = None,
    overrides: Overrides = [],  # noqa: B006  (typer copies it)
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    show_config: Annotated[bool, typer.Option("--show-config", help="Print each value and where it is from.")] = False,
    allow_change: Annotated[
        list[str], typer.Option("--allow-change", metavar="KEY", help="Accept a difference when resuming.")
    ] = [],  # noqa: B006
) -> None:
    """Train an adapter from one YAML file."""
    from trietune.config import load_config
    from trietune.config import show_config as describe
    from trietune.demo import demo_config

    if resume:
        overrides = [*overrides, "resume_from_checkpoint=True"]
    settings = load_config(config or demo_config(), overrides)
    if show_config:
        typer.echo(describe(settings))
        return
    if dry_run:
        _print_plan(settings)
        return
    from trietune.run import train as run_training

    raise typer.Exit(run_training(settings, allowed_changes=frozenset(allow_change)).exit_code)


def _print_plan(settings: object) -> None:
    from trietune.prepare import prepare
    from trietune.tracking.consumers import open_tracker
    from trietune.tracking.result import columns

    hub = open_tracker(tracker="none", writes_files=False)
    try:
        prepared = prepare(settings, hub, lambda: None)  # type: ignore[arg-type]
    finally:
        hub.close()
    for line in columns(prepared.plan.lines()):
        typer.echo(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors of the user are printed without a traceback."""
    _leave_telemetry_off()
    try:
        app(args=list(sys.argv[1:] if arguments is None else arguments))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_DONE if end.code is None else EXIT_BUG
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except StopRequested as stop:
        sys.stderr.write(f"stopped by {stop.signal_name}; nothing was written\n")
        return stop.exit_code
    return EXIT_DONE


def _leave_telemetry_off() -> None:
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "WANDB_ERROR_REPORTING": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }.items():
        os.environ.setdefault(name, value)
