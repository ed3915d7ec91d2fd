"""The application: its commands, and what becomes of their errors. Each family of commands has a module here."""

from __future__ import annotations

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
from trietune.cli.streams import OutputLost, end_streams, exit_code_of, guard_streams
from trietune.cli.sweep import sweep
from trietune.cli.train import train
from trietune.errors import EXIT_BUG, EXIT_DONE, StopRequested, UserError
from trietune.io.causes import first_line, lacks_threads
from trietune.ranks.launched import be_quiet_if_launched
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
    if arguments is None:
        guard_streams()
    return end_streams(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    began = time.monotonic() - (process_age_s() if arguments is None else 0.0)
    _leave_telemetry_off()
    be_quiet_if_launched()
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
        say(f"stopped by {stop.signal_name} before there was anything to save", err=True)
        return stop.exit_code
    except KeyboardInterrupt:
        return 130
    except OutputLost as lost:
        return exit_code_of(lost)
    except (OSError, MemoryError) as error:
        return _refused_by_the_system(error)
    except BaseException as error:
        # What panics in Rust (tokenizers, safetensors) comes as an exception of its own, beside `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        return _without_means(error) or _report_bug(error)
    return EXIT_DONE


def _without_means(error: BaseException) -> int | None:
    """The exit code where memory or threads ran out, which is said; None for anything else."""
    if lacks_threads(error):
        mistake = UserError(
            "the system gives this process no further thread",
            next_step="raise its limits (`ulimit -u`, `ulimit -v`), or set OMP_NUM_THREADS=1 and RAYON_NUM_THREADS=1",
        )
    elif "torch" in sys.modules and _is_out_of_memory(error):
        mistake = UserError(
            f"memory ran out: {first_line(error)[:200]}",
            next_step="a smaller model or `max_tokens_per_micro_batch` needs less; `ulimit -v` shows whether this "
            "process is limited",
        )
    else:
        return None
    say(str(mistake), err=True)
    return mistake.exit_code


def _is_out_of_memory(error: BaseException) -> bool:
    from trietune.device.memory import is_out_of_memory  # loads torch

    return is_out_of_memory(error)


def _refused_by_the_system(error: OSError | MemoryError) -> int:
    """A file that vanished, a right that is missing, a full disk or memory: no change of ours would mend it."""
    from trietune.config.secrets import without_secrets  # loads pydantic
    from trietune.io.disk_errors import REMEDIES

    number = error.errno if isinstance(error, OSError) else None
    names = [str(name) for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    reason = "memory ran out" if isinstance(error, MemoryError) else getattr(error, "strerror", None) or str(error)
    try:
        trace = f"\n       where it happened is in {_write_traceback(error)}"
    except OSError:
        trace = ""
    mistake = UserError(
        f"the system refused: {reason or type(error).__name__}",
        where=(" and ".join(names) or "it named no file") + trace,
        next_step=REMEDIES.get(number or 0, "look at that file or folder, its disk and its rights; then try again"),
    )
    say(str(without_secrets(str(mistake))), err=True)
    return mistake.exit_code


def _write_traceback(error: BaseException) -> str:
    from trietune.config.secrets import without_secrets  # loads pydantic

    with tempfile.NamedTemporaryFile(
        "w", prefix="trietune-error-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(str(without_secrets("".join(traceback.format_exception(error)))))
    return file.name


def _report_bug(error: BaseException) -> int:
    from trietune.config.secrets import without_secrets  # loads pydantic

    try:
        name = _write_traceback(error)
    except OSError as refused:  # no room in the temporary folder
        name = f"no file, for it could not be written: {refused.strerror}"
    say(
        f"error: a bug in TrieTune: {type(error).__name__}: {without_secrets(str(error))[:300]}\n"
        f"       the whole traceback is in {name}\n"
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
