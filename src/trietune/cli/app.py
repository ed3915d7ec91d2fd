"""The application: its commands, and what becomes of their errors. Each family of commands has a module here."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

import trietune
from trietune.cli.cache import cache
from trietune.cli.checkpoints import checkpoints, sync, verify
from trietune.cli.commands import Commands
from trietune.cli.estimate import estimate
from trietune.cli.evaluate import evaluate
from trietune.cli.export import export
from trietune.cli.init import doctor, init
from trietune.cli.keys import CommandWithKeys
from trietune.cli.predict import predict
from trietune.cli.printing import say
from trietune.cli.report import compare, report
from trietune.cli.sweep import sweep
from trietune.cli.train import train
from trietune.errors import EXIT_BUG, EXIT_DONE, StopRequested, UserError
from trietune.ranks.messages import FailedElsewhere
from trietune.run.malloc import keep_freed_memory
from trietune.run.signals import process_age_s

app = typer.Typer(
    name="trietune",
    cls=Commands,
    help="Exact LoRA fine-tuning that computes every shared prefix once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# In the order in which `--help` lists them.
for command_with_keys in (train, estimate, sweep, evaluate, predict):
    app.command(cls=CommandWithKeys)(command_with_keys)
for command in (export, report, compare, checkpoints, verify, sync, init, doctor, cache):
    app.command()(command)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Exact LoRA fine-tuning that computes every shared prefix once."""
    if version:
        say(trietune.__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors of the user are printed without a traceback."""
    code = _run(arguments)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            # Python would end with 120 for what its exit cannot write; the terminal has gone, or the disk is full.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def _run(arguments: Sequence[str] | None) -> int:
    began = time.monotonic() - (process_age_s() if arguments is None else 0.0)
    _leave_telemetry_off()
    keep_freed_memory()
    try:
        app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="trietune", obj=began)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_DONE if end.code is None else EXIT_BUG
    except FailedElsewhere as error:
        return error.exit_code
    except UserError as error:
        from trietune.config.secrets import without_secrets  # loads pydantic

        say(str(without_secrets(str(error))), err=True)
        return error.exit_code
    except StopRequested as stop:
        with contextlib.suppress(OSError):  # after a hang-up there is no terminal
            say(f"stopped by {stop.signal_name} before there was anything to save", err=True)
        return stop.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, as `| head` does; nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception as error:
        return _report_bug(error)
    return EXIT_DONE


def _report_bug(error: Exception) -> int:
    from trietune.config.secrets import without_secrets  # loads pydantic

    with tempfile.NamedTemporaryFile(
        "w", prefix="trietune-error-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(str(without_secrets("".join(traceback.format_exception(error)))))
    say(
        f"error: a bug in TrieTune: {type(error).__name__}: {without_secrets(str(error))[:300]}\n"
        f"       the whole traceback is in {file.name}\n"
        "next:  please report it with that file and the output of `trietune doctor`",
        err=True,
    )
    return EXIT_BUG


def _leave_telemetry_off() -> None:
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "WANDB_ERROR_REPORTING": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }.items():
        os.environ.setdefault(name, value)
