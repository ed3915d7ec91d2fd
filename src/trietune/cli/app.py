"""The commands: read arguments, call, print, set the exit code."""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from trietune.cli.streams import OutputLost, end_streams, exit_code_of, guard_streams, verdict
from trietune.errors import EXIT_BUG, EXIT_DONE, EXIT_THRESHOLD_MISSED, EXIT_UPLOAD_INCOMPLETE, StopRequested, UserError
from trietune.io.outputs import check_output, write_output
from trietune.ranks.launched import command_began, refuse_several_processes
from trietune.ranks.messages import FailedElsewhere
from trietune.run.malloc import keep_freed_memory
from trietune.run.signals import process_age_s

if TYPE_CHECKING:
    from trietune.config.settings import Settings
    from trietune.evaluation.evaluate import Evaluation
    from trietune.run.opened import LoadedModel

JSON_VERSION = 1
# When this command began, on the clock of `time.monotonic`: `max_time` counts from there.
_began = time.monotonic()

app = typer.Typer(
    name="trietune",
    help="Exact LoRA fine-tuning that computes every shared prefix once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# typer reads these annotations at run time, so they are written as it understands them on every Python.
MaybePath = Optional[Path]  # noqa: UP045
Overrides = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Target = Annotated[str, typer.Argument(help="A run's folder, an adapter's folder, or a base model.")]
RunFolder = Annotated[Path, typer.Argument(help="A run's folder.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Exact LoRA fine-tuning that computes every shared prefix once."""
    if version:
        import trietune

        _say(trietune.__version__)
        raise typer.Exit


@app.command()
def train(
    config: Annotated[MaybePath, typer.Argument(help="YAML file; without one, the sample model and data.")] = None,
    overrides: Overrides = [],  # noqa: B006  (typer copies it)
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    show_config: Annotated[bool, typer.Option("--show-config", help="Print each value and where it is from.")] = False,
    allow_change: Annotated[
        list[str],
        typer.Option("--allow-change", metavar="KEY", help="Accept a difference, or `optimizer_state`, when resuming."),
    ] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: the plan as JSON.")] = False,
    nproc: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--nproc", metavar="N|auto", help="Processes on this machine that share each step."),
    ] = None,
    restarts: Annotated[
        int, typer.Option("--restarts", min=0, help="With --nproc: how often to go on after a lost process.")
    ] = 0,
) -> None:
    """Train an adapter from one YAML file."""
    from trietune.config import load_config
    from trietune.config import show_config as describe
    from trietune.demo import demo_config

    if resume:
        overrides = [*overrides, "resume_from_checkpoint=auto"]
    settings = load_config(config or demo_config(), overrides)
    keys = {override.partition("=")[0].strip() for override in overrides}
    if config is None and settings.learns_preferences and not keys & {"dataset_id", "train_file"}:
        settings = load_config(demo_config(learns_preferences=True), overrides)
    if show_config:
        _say(describe(settings))
        return
    if restarts and nproc is None:
        raise UserError("`--restarts` watches the processes of `--nproc`", next_step="--nproc 2 --restarts 3")
    count = _number_of_processes(nproc)
    if dry_run:
        _print_plan(settings, as_json=as_json, num_processes=count)
        return
    if count > 1:
        from trietune.ranks.launch import launch

        options = [f"--set={override}" for override in overrides]
        options += [f"--allow-change={key}" for key in allow_change]
        command = [sys.executable, "-m", "trietune", "train", *([] if config is None else [str(config)]), *options]
        say = functools.partial(_say, err=True)
        raise typer.Exit(launch(command, count, restarts=restarts, began=_began, say=say))
    _set_log_level(settings.log_level)
    from trietune.run.session import train as run_training

    began = command_began() or _began
    raise typer.Exit(run_training(settings, allowed_changes=frozenset(allow_change), began=began).exit_code)


@app.command()
def estimate(
    config: Annotated[MaybePath, typer.Argument(help="YAML file; without one, the sample model and data.")] = None,
    overrides: Overrides = [],  # noqa: B006
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="h200, h100, a100, l4, cpu; default: this machine's, measured."),
    ] = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Processes that share each step.")] = 1,
    price: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, metavar="EUR", help="Of one device for an hour; the total is printed."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say how long a run would take, how much memory, and at what cost."""
    from trietune.cli.estimating import estimate_command
    from trietune.config import load_config
    from trietune.demo import demo_config
    from trietune.tracking.console.result import columns

    refuse_several_processes()
    settings = load_config(config or demo_config(), overrides)
    with _console() as hub:
        lines, document = estimate_command(settings, hub, device=device, num_processes=nproc, price=price)
    if as_json:
        _print_json({"estimate": document})
        return
    for line in columns(lines):
        _say(line)


@app.command()
def evaluate(
    target: Target,
    dataset: Annotated[Optional[str], typer.Option(help="Hub id, file or folder; default: the run's data.")] = None,  # noqa: UP045
    split: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="train, validation or test; default: validation, or every row of --dataset without one."),
    ] = None,
    max_examples: Annotated[Optional[int], typer.Option(min=1, help="A random subset of this size.")] = None,  # noqa: UP045
    require: Annotated[
        list[str], typer.Option(metavar="METRIC>=VALUE", help="Exit with 4 if this does not hold; may be repeated.")
    ] = [],  # noqa: B006
    predictions: Annotated[
        MaybePath,
        typer.Option("--predictions", metavar="FILE", help="What it said to each example: SQuAD's JSON, or JSONL."),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Measure a run, an adapter or a base model."""
    from trietune.run.opened import evaluate as measure

    if dataset is not None:
        # A run's own files would win over the data set that is asked for here.
        cleared = ["train_file=null", "validation_file=null"]
        overrides = [*cleared, f"dataset_id={dataset}", *overrides]
    bounds = [_parse_bound(text) for text in require]
    with _console() as tracker:
        found = measure(
            target, overrides=overrides, split=split, max_examples=max_examples, tracker=tracker, keep=predictions
        )
    missed = [text for text, (name, is_least, value) in zip(require, bounds, strict=True)
              if not _holds(found, name, is_least, value)]  # fmt: skip
    with verdict(EXIT_THRESHOLD_MISSED if missed else EXIT_DONE):
        if as_json:
            _print_json(
                {
                    "target": target,
                    "split": split or ("validation" if dataset is None else None),
                    "num_examples": found.num_examples,
                    "metrics": dict(found.metrics),
                    "intervals": {name: list(bound) for name, bound in found.intervals.items()},
                }
            )
        else:
            for line in _evaluation_lines(found):
                _say_line(line)
        if missed:
            _say(f"not reached: {', '.join(missed)}", err=True)


@app.command()
def predict(
    target: Target,
    text: Annotated[list[str], typer.Option(help="What to ask; may be repeated.")] = [],  # noqa: B006
    input_file: Annotated[
        MaybePath, typer.Option("--input", help="Texts, one a line, or .jsonl with columns; `-` is stdin.")
    ] = None,
    output_file: Annotated[MaybePath, typer.Option("--output", help="JSONL; `-` is stdout.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Ask a model: a text, a file, a pipe; at a terminal without text, a conversation."""
    from trietune.run.opened import open_model
    from trietune.run.opened import predict as ask
    from trietune.run.signals import StopSignals

    if output_file is not None and str(output_file) == "-":
        output_file, writes_lines = None, True
    else:
        writes_lines = False
    if output_file is not None:
        check_output(output_file, "--output")
    is_chat = not text and input_file is None and sys.stdin.isatty()
    inputs = [] if is_chat else [*text, *_read_inputs(input_file, has_text=bool(text))]
    with _console() as tracker:
        opened = open_model(target, overrides, tracker)
    if is_chat:
        _chat(opened, max_new_tokens)
        return
    with StopSignals() as signals:
        answers = ask(opened, inputs, max_new_tokens=max_new_tokens, check_stop=signals.check)
    records = [{"input": given, **answer} for given, answer in zip(inputs, answers, strict=True)]
    if output_file is not None:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_output(output_file, lines.encode("utf-8", "backslashreplace"), "--output")
        _say(f"{len(records):,} answers in {output_file}", err=True)
    elif writes_lines:
        for record in records:
            _print_json_line(record)
    elif as_json:
        _print_json({"target": target, "predictions": records})
    else:
        for record in records:
            _say(_answer_line(record))


@app.command()
def export(
    target: Annotated[Path, typer.Argument(help="A run's folder or an adapter's.")],
    out: Annotated[MaybePath, typer.Argument(help="New folder; with --push it may be left out.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="A whole model: the adapter added to its base.")] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Fold the scale into the weights, for servers that ignore it.")
    ] = False,
    to: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--to", metavar="PROGRAM", help="For gguf, ollama, vllm, mlx or transformers; proved before done."
        ),
    ] = None,
    quantize: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FORMAT", help="Of GGUF files: f32, bf16, f16, q8_0, q4_k_m."),
    ] = None,
    push: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--push", metavar="OWNER/NAME", help="Upload what is exported to this repository of the hub."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: a new repository is public.")] = False,
) -> None:
    """Copy an adapter, merge it into its base model, or write it as another program wants it."""
    from trietune.cli.exporting import export_command

    refuse_several_processes()
    with _console() as tracker:
        lines = export_command(
            target, out, tracker, merge=merge, plain=plain, to=to, quantize=quantize, push=push, is_public=public
        )
    for line in lines:
        _say_line(line)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are compared.")],
    out: Annotated[MaybePath, typer.Option(help="HTML file, or `-`; default: report.html in the (first) run.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Print it instead of writing a page.")] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Show it at an address of this machine, refreshed while a run goes on.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --serve: 0 takes a free one.")] = 0,
) -> None:
    """Write one page about one run, or several side by side."""
    from trietune.tracking.report.report import render_runs, report_text

    if serve:
        _serve(runs, port)
        return
    if text:
        _say(report_text(runs))
        return
    if out is not None and str(out) == "-":
        page_text = render_runs(runs)
        if sys.stdout.isatty():
            _say(page_text)
        else:
            sys.stdout.write(page_text)
        return
    page = out or runs[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    write_output(page, render_runs(runs).encode(), "--out")
    _say_line(str(page))


@app.command()
def compare(
    first: RunFolder, second: Annotated[Path, typer.Argument(help="The run that is compared with it.")]
) -> None:
    """Test whether one run is better than another, example by example, and name the settings that differ."""
    from trietune.tracking.report.report import compare_text

    _say(compare_text([first, second]), nl=False)


@app.command()
def checkpoints(run: RunFolder, as_json: AsJson = False) -> None:
    """List a run's checkpoints: step, metric, size, whole or damaged, where, best."""
    from trietune.checkpoints.overview import list_checkpoints
    from trietune.tracking.console.result import columns

    store, remote, settings = _open_store(run)
    rows = list_checkpoints(store, remote)
    if as_json:
        _print_json({"run": str(run), "metric": store.metric, "checkpoints": [row.as_json() for row in rows]})
        return
    if not rows:
        _say_line(f"{run} has no checkpoints")
        return
    table = [("step", settings.checkpoint_metric, "size", "state", "where", "")]
    for row in rows:
        value = "-" if row.metric is None else f"{row.metric:.4g}"
        state = "whole" if row.damage is None else f"damaged: {row.damage}"
        table.append(
            (f"{row.step:,}", value, f"{row.size_bytes / 1e6:.1f} MB", state, row.place, "best" if row.is_best else "")
        )
    for line in columns(table):
        _say_line(line)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A checkpoint, an adapter, or a run's folder.")], as_json: AsJson = False
) -> None:
    """Prove that checkpoints and adapters are whole: every byte against its manifest."""
    from trietune.checkpoints.overview import verify_path

    proofs = verify_path(path)
    with verdict(EXIT_BUG if any(proof.damage is not None for proof in proofs) else EXIT_DONE):
        if as_json:
            _print_json(
                {"proofs": [{"path": str(p.path), "step": p.step, "size_bytes": p.size_bytes, "damage": p.damage,
                             "extra": list(p.extra)} for p in proofs]}
            )  # fmt: skip
            return
        for proof in proofs:
            state = f"whole, {proof.size_bytes:,} bytes" if proof.damage is None else f"damaged: {proof.damage}"
            also = f"; beside it: {', '.join(proof.extra)}" if proof.extra else ""
            _say_line(f"{proof.path}: {state}{also}")


@app.command()
def sync(run: RunFolder) -> None:
    """Upload what the storage does not have yet: checkpoints, the final adapter, the run's files."""
    from trietune.checkpoints.lock import RunLock
    from trietune.checkpoints.remote.uploads import synchronize

    store, remote, _ = _open_store(run)
    if remote is None:
        raise UserError(
            f"{run} has no storage to upload to",
            where=f"`remote_path` is empty in {run / 'config.yaml'}",
            next_step="train with `sync_to_storage: True`, `storage_backend` and `remote_path`",
        )
    with RunLock(run):
        try:
            result = synchronize(store, remote)
        except UserError:
            raise
        except Exception as error:
            _say(f"error: {remote.location}: {error}\nnext:  the same command tries again", err=True)
            raise typer.Exit(EXIT_UPLOAD_INCOMPLETE) from error
    for warning in result.warnings:
        _say_line(f"warning: {warning}", err=True)
    _say(f"{remote.location}: {len(result.uploaded)} uploaded" + "".join(f"\n  {n}" for n in result.uploaded))


@app.command()
def init(
    kind: Annotated[str, typer.Argument(help="sst2, squad, chat or jsonl.")] = "sst2",
    out: Annotated[MaybePath, typer.Option(help="File to write; default: KIND.yaml here.")] = None,
) -> None:
    """Write a commented configuration file, and the schema by which an editor checks it."""
    from trietune.config.schema import json_schema
    from trietune.config.template import SCHEMA_FILE, render_template, template_kinds

    if kind not in template_kinds():
        raise UserError(f"there is no template `{kind}`", next_step=f"trietune init {'|'.join(template_kinds())}")
    target = out or Path(f"{kind}.yaml")
    if os.path.lexists(target):
        raise UserError(f"`{target}` exists already", next_step=f"trietune init {kind} --out ANOTHER.yaml")
    schema = target.parent / SCHEMA_FILE
    check_output(schema, "init")
    write_output(target, render_template(kind).encode(), "--out")
    write_output(schema, (json.dumps(json_schema(), indent=1) + "\n").encode(), "init")
    _say_line(f"{target}: every line has its meaning beside it")
    _say_line(f"next:  trietune train {target} --dry-run")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is here, what would be used and why, and what is missing."""
    from trietune.device.doctor import examine

    found = examine()
    if as_json:
        _print_json(found.as_json())
        return
    for line in found.lines():
        _say(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors of the user are printed without a traceback."""
    if arguments is None:
        guard_streams()
    return end_streams(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    global _began
    _began = time.monotonic() - (process_age_s() if arguments is None else 0.0)
    _leave_telemetry_off()
    keep_freed_memory()
    try:
        app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="trietune")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_DONE if end.code is None else EXIT_BUG
    except FailedElsewhere as error:
        return error.exit_code
    except UserError as error:
        from trietune.config.secrets import without_secrets

        _say(str(without_secrets(str(error))), err=True)
        return error.exit_code
    except StopRequested as stop:
        _say(f"stopped by {stop.signal_name} before there was anything to save", err=True)
        return stop.exit_code
    except KeyboardInterrupt:
        return 130
    except OutputLost as lost:
        return exit_code_of(lost)
    except OSError as error:
        return _refused_by_the_system(error)
    except MemoryError as error:
        return _refused_by_the_system(error)
    except Exception as error:
        return _report_bug(error)
    return EXIT_DONE


def _refused_by_the_system(error: OSError | MemoryError) -> int:
    """A file that vanished, a right that is missing, a full disk or memory: no change of ours would mend it."""
    from trietune.config.secrets import without_secrets
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
    _say(str(without_secrets(str(mistake))), err=True)
    return mistake.exit_code


def _write_traceback(error: BaseException) -> str:
    from trietune.config.secrets import without_secrets

    with tempfile.NamedTemporaryFile(
        "w", prefix="trietune-error-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(str(without_secrets("".join(traceback.format_exception(error)))))
    return file.name


def _report_bug(error: Exception) -> int:
    from trietune.config.secrets import without_secrets

    try:
        name = _write_traceback(error)
    except OSError as refused:  # no room in the temporary folder
        name = f"no file, for it could not be written: {refused.strerror}"
    _say(
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


def _set_log_level(level: str) -> None:
    import logging

    from trietune.tracking.terminal import VisibleFormatter, make_warnings_visible

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(VisibleFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    make_warnings_visible()
    logging.getLogger("trietune").setLevel(level)


class _console:  # noqa: N801  (reads as a function)
    """A tracker that writes to the console alone, closed at the end."""

    def __enter__(self) -> Any:
        from trietune.tracking.open import open_tracker

        self.tracker = open_tracker(tracker="none", writes_files=False)
        return self.tracker

    def __exit__(self, *exception: object) -> None:
        self.tracker.close()


def _number_of_processes(nproc: str | None) -> int:
    """What `--nproc` asks for; `auto` is one process for each CUDA device, said."""
    if nproc is None:
        return 1
    refuse_several_processes()
    if nproc == "auto":
        import torch

        found = torch.cuda.device_count()
        _say(
            f"--nproc auto: {found} processes, one for each CUDA device"
            if found > 1
            else f"--nproc auto: one process ({found or 'no'} CUDA device{'' if found else 's'} here)",
            err=True,
        )
        return max(found, 1)
    if not nproc.isdecimal() or int(nproc) < 1:
        raise UserError(f"`--nproc {nproc}` is not a number of processes", next_step="--nproc 2   (or --nproc auto)")
    return int(nproc)


def _print_plan(settings: Settings, *, as_json: bool, num_processes: int = 1) -> None:
    from trietune.ranks.launch import as_one_of
    from trietune.run.prepare import prepare
    from trietune.run.signals import StopSignals
    from trietune.tracking.console.result import columns

    refuse_several_processes()
    with _console() as tracker, StopSignals() as signals, as_one_of(num_processes):
        prepared = prepare(settings, tracker, signals.check, num_processes=num_processes)
    if as_json:
        _print_json({"plan": dict(prepared.plan.lines()), "num_steps": prepared.plan.num_steps})
        return
    for line in columns(prepared.plan.lines()):
        _say_line(line)


def _print_json(document: dict[str, Any]) -> None:
    _print_json_line({"schema_version": JSON_VERSION, **document})


def _print_json_line(record: dict[str, Any]) -> None:
    from trietune.tracking.terminal import write_json

    write_json(sys.stdout, record)


def _say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Text for people, on stdout or stderr."""
    from trietune.tracking.terminal import write_text

    write_text(sys.stderr if err else sys.stdout, f"{text}\n" if nl else text)


def _say_line(text: str, *, err: bool = False) -> None:
    """One line for people: what is in it, such as the name of a file, makes no second one."""
    from trietune.tracking import wording

    _say("\t".join(map(wording.line, text.split("\t"))), err=err)


def _parse_bound(text: str) -> tuple[str, bool, float]:
    for sign, is_least in ((">=", True), ("<=", False)):
        name, found, value = text.partition(sign)
        if found:
            try:
                return name.strip() if "/" in name else f"eval/{name.strip()}", is_least, float(value)
            except ValueError:
                break
    raise UserError(f"`--require {text}` is no bound", next_step="--require 'accuracy>=0.9'   (or <=)")


def _holds(found: Evaluation, name: str, is_least: bool, bound: float) -> bool:
    if name not in found.metrics:
        raise UserError(
            f"`--require` names `{name}`, which was not measured", next_step=f"one of {', '.join(found.metrics)}"
        )
    value = found.metrics[name]
    return value >= bound if is_least else value <= bound


def _evaluation_lines(found: Evaluation) -> list[str]:
    from trietune.tracking import wording
    from trietune.tracking.console.result import columns

    rows = [("examples", f"{found.num_examples:,}", "")]
    for name, value in found.metrics.items():
        interval = f"({wording.interval(name, *found.intervals[name])})" if name in found.intervals else ""
        rows.append((wording.metric_name(name), wording.metric_value(name, value), interval))
    lines = columns(rows)
    return [*lines, "(95 % intervals in parentheses)"] if found.intervals else lines


def _read_inputs(path: Path | None, *, has_text: bool) -> Iterator[Any]:
    from trietune.data.json_text import JsonDecoder, RepeatedKeyError

    if path is None and (has_text or sys.stdin.isatty()):
        return
    is_stdin = path is None or str(path) == "-"
    try:
        text = sys.stdin.read() if is_stdin else path.read_text("utf-8-sig")  # type: ignore[union-attr]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`--input {path}` cannot be read: {error}", next_step="check the path") from error
    # Not `splitlines`: a text may hold the other separators that it knows.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    is_json = (path is not None and path.suffix.lower() in (".jsonl", ".ndjson")) or (
        is_stdin and bool(lines) and lines[0].startswith("{")
    )
    decoder = JsonDecoder()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield decoder.decode(line) if is_json else line
        except RepeatedKeyError as error:
            raise UserError(
                f"{path or 'stdin'}:{number} has a {error}", next_step="remove one of the two values"
            ) from error
        except (ValueError, RecursionError) as error:
            what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise UserError(f"{path or 'stdin'}:{number} is not JSON: {what}") from None


def _answer_line(record: dict[str, Any]) -> str:
    from trietune.tracking import wording

    if "label" not in record:
        return str(record["text"])
    others = "  ".join(f"{name} {share:.1%}" for name, share in record["probabilities"].items())
    return f"{wording.line(str(record['label']))}\t{wording.line(others)}"


def _chat(opened: LoadedModel, max_new_tokens: int) -> None:
    """Ask and answer until the end of input; adapters that were not trained on chats answer one text at a time."""
    from trietune.data.examples import Message
    from trietune.evaluation.predict import answer_turn, prompt_length
    from trietune.run.opened import predict as ask

    encoder = opened.encoder()
    is_chat = encoder.prompt_format.kind == "chat"
    _say(f"{opened.name}: write a line; Ctrl-D ends" + ("; `/new` begins anew" if is_chat else ""), err=True)
    messages: list[Message] = []
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            _say("", err=True)
            return
        if not line:
            continue
        if line == "/new":
            messages = []
            continue
        try:
            if not is_chat:
                _say(_answer_line(ask(opened, [line], max_new_tokens=max_new_tokens)[0]))
                continue
            messages = [*messages, Message("user", line)]
            turn = answer_turn(
                opened.model,
                encoder,
                messages,
                max_positions=opened.prove_for(prompt_length(encoder, messages) + max_new_tokens),
                max_new_tokens=max_new_tokens,
                on_text=lambda piece: _say(piece, nl=False),
            )
            _say("")
            messages = [*messages, turn]
        except UserError as error:
            _say(str(error), err=True)


def _serve(runs: Sequence[Path], port: int) -> None:
    from trietune.tracking.report.serve import serve_report

    with serve_report(runs, port=port, say=_say) as server:
        _say("Ctrl-C ends it", err=True)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            _say("", err=True)


def _open_store(run: Path) -> Any:
    from trietune.checkpoints.overview import read_run_id
    from trietune.checkpoints.remote.open import open_remote
    from trietune.checkpoints.store import CheckpointStore
    from trietune.config import load_config

    if not (run / "config.yaml").is_file():
        raise UserError(f"`{run}` is no run: it has no config.yaml", next_step="name a run's folder: runs/NAME")
    settings = load_config(run / "config.yaml", ())
    store = CheckpointStore(
        run_directory=run,
        run_id=read_run_id(run),
        keep_last_n=settings.keep_last_n,
        keep_best_n=settings.keep_best_n,
        metric=settings.checkpoint_metric,
        mode=settings.checkpoint_metric_mode,
    )
    return store, open_remote(settings.storage_backend, settings.remote_path, run.resolve().name), settings


if __name__ == "__main__":
    sys.exit(main())
