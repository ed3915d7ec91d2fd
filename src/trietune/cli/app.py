"""The commands: read arguments, call, print, set the exit code."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from trietune.errors import EXIT_BUG, EXIT_DONE, EXIT_THRESHOLD_MISSED, EXIT_UPLOAD_INCOMPLETE, StopRequested, UserError
from trietune.ranks.launched import refuse_several_processes
from trietune.ranks.messages import FailedElsewhere
from trietune.run.malloc import keep_freed_memory

if TYPE_CHECKING:
    from trietune.config.settings import Settings
    from trietune.evaluation.evaluate import Evaluation
    from trietune.run.opened import Opened

JSON_VERSION = 1

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

        typer.echo(trietune.__version__)
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
    if show_config:
        typer.echo(describe(settings))
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
        raise typer.Exit(launch(command, count, restarts=restarts, say=lambda text: typer.echo(text, err=True)))
    _set_log_level(settings.log_level)
    from trietune.run.session import train as run_training

    raise typer.Exit(run_training(settings, allowed_changes=frozenset(allow_change)).exit_code)


@app.command()
def evaluate(
    target: Target,
    dataset: Annotated[Optional[str], typer.Option(help="Hub id, file or folder; default: the run's data.")] = None,  # noqa: UP045
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    max_examples: Annotated[Optional[int], typer.Option(min=1, help="A random subset of this size.")] = None,  # noqa: UP045
    require: Annotated[
        list[str], typer.Option(metavar="METRIC>=VALUE", help="Exit with 4 if this does not hold; may be repeated.")
    ] = [],  # noqa: B006
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
    with _console() as hub:
        found = measure(target, overrides=overrides, split=split, max_examples=max_examples, tracker=hub)
    if as_json:
        _print_json(
            {
                "target": target,
                "split": split,
                "num_examples": found.num_examples,
                "metrics": dict(found.metrics),
                "intervals": {name: list(bound) for name, bound in found.intervals.items()},
            }
        )
    else:
        for line in _evaluation_lines(found):
            typer.echo(line)
    missed = [text for text, (name, is_least, value) in zip(require, bounds, strict=True)
              if not _holds(found, name, is_least, value)]  # fmt: skip
    if missed:
        typer.echo(f"not reached: {', '.join(missed)}", err=True)
        raise typer.Exit(EXIT_THRESHOLD_MISSED)


@app.command()
def predict(
    target: Target,
    text: Annotated[list[str], typer.Option(help="What to ask; may be repeated.")] = [],  # noqa: B006
    input_file: Annotated[
        MaybePath, typer.Option("--input", help="Texts, one a line, or .jsonl with columns; `-` is stdin.")
    ] = None,
    output_file: Annotated[MaybePath, typer.Option("--output", help="JSONL; stdout if not given.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Ask a model: a text, a file, a pipe; at a terminal without text, a conversation."""
    from trietune.run.opened import open_model
    from trietune.run.opened import predict as ask
    from trietune.run.signals import StopSignals

    is_chat = not text and input_file is None and sys.stdin.isatty()
    inputs = [] if is_chat else [*text, *_read_inputs(input_file, has_text=bool(text))]
    with _console() as hub:
        opened = open_model(target, overrides, hub)
    if is_chat:
        _chat(opened, max_new_tokens)
        return
    with StopSignals() as signals:
        answers = ask(opened, inputs, max_new_tokens=max_new_tokens, check_stop=signals.check)
    records = [{"input": given, **answer} for given, answer in zip(inputs, answers, strict=True)]
    if output_file is not None:
        from trietune.io import files

        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        files.replace_file(output_file, lines.encode())
        typer.echo(f"{len(records):,} answers in {output_file}", err=True)
    elif as_json:
        _print_json({"target": target, "predictions": records})
    else:
        for record in records:
            typer.echo(_answer_line(record))


@app.command()
def export(
    target: Annotated[Path, typer.Argument(help="A run's folder or an adapter's.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="A whole model: the adapter added to its base.")] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Fold the scale into the weights, for servers that ignore it.")
    ] = False,
) -> None:
    """Copy an adapter, or merge it into its base model, for use elsewhere."""
    from trietune.model.adapter.export import base_name_of, export_adapter, find_adapter
    from trietune.run.prepare import locate_base

    refuse_several_processes()
    with _console() as hub:
        base = locate_base(base_name_of(find_adapter(target)), hub) if merge else None
        written = export_adapter(target, out, merge=merge, plain=plain, base=base, report=hub.say)
    typer.echo(f"{written.folder}: {written.num_bytes:,} bytes")
    for dtype, difference in written.logit_differences.items():
        typer.echo(f"largest difference of a logit, merged against adapter, in {dtype}: {difference:.2e}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are compared.")],
    out: Annotated[MaybePath, typer.Option(help="HTML file; default: report.html in the (first) run.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Print it instead of writing a page.")] = False,
) -> None:
    """Write one page about one run, or several side by side."""
    from trietune.tracking.report.report import report_text, write_report

    if text:
        typer.echo(report_text(runs))
        return
    page = out or runs[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    write_report(runs, page)
    typer.echo(str(page))


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
        typer.echo(f"{run} has no checkpoints")
        return
    table = [("step", settings.checkpoint_metric, "size", "state", "where", "")]
    for row in rows:
        value = "-" if row.metric is None else f"{row.metric:.4g}"
        state = "whole" if row.damage is None else f"damaged: {row.damage}"
        table.append(
            (f"{row.step:,}", value, f"{row.size_bytes / 1e6:.1f} MB", state, row.place, "best" if row.is_best else "")
        )
    for line in columns(table):
        typer.echo(line)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A checkpoint, an adapter, or a run's folder.")], as_json: AsJson = False
) -> None:
    """Prove that checkpoints and adapters are whole: every byte against its manifest."""
    from trietune.checkpoints.overview import verify_path

    proofs = verify_path(path)
    if as_json:
        _print_json(
            {"proofs": [{"path": str(p.path), "step": p.step, "size_bytes": p.size_bytes, "damage": p.damage,
                         "extra": list(p.extra)} for p in proofs]}
        )  # fmt: skip
    else:
        for proof in proofs:
            state = f"whole, {proof.size_bytes:,} bytes" if proof.damage is None else f"damaged: {proof.damage}"
            also = f"; beside it: {', '.join(proof.extra)}" if proof.extra else ""
            typer.echo(f"{proof.path}: {state}{also}")
    if any(proof.damage is not None for proof in proofs):
        raise typer.Exit(EXIT_BUG)


@app.command()
def sync(run: RunFolder) -> None:
    """Upload what the storage does not have yet: checkpoints, the final adapter, the run's files."""
    from trietune.checkpoints.lock import RunLock
    from trietune.checkpoints.remote.uploads import synchronise

    store, remote, _ = _open_store(run)
    if remote is None:
        raise UserError(
            f"{run} has no storage to upload to",
            where=f"`remote_path` is empty in {run / 'config.yaml'}",
            next_step="train with `sync_to_storage: True`, `storage_backend` and `remote_path`",
        )
    with RunLock(run):
        try:
            result = synchronise(store, remote)
        except UserError:
            raise
        except Exception as error:
            typer.echo(f"error: {remote.location}: {error}\nnext:  the same command tries again", err=True)
            raise typer.Exit(EXIT_UPLOAD_INCOMPLETE) from error
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{remote.location}: {len(result.uploaded)} uploaded" + "".join(f"\n  {n}" for n in result.uploaded))


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
    if target.exists():
        raise UserError(f"`{target}` exists already", next_step=f"trietune init {kind} --out ANOTHER.yaml")
    target.write_text(render_template(kind), encoding="utf-8")
    (target.parent / SCHEMA_FILE).write_text(json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8")
    typer.echo(f"{target}: every line has its meaning beside it")
    typer.echo(f"next:  trietune train {target} --dry-run")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is here, what would be used and why, and what is missing."""
    from trietune.device.doctor import examine

    found = examine()
    if as_json:
        _print_json(found.as_json())
        return
    for line in found.lines():
        typer.echo(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors of the user are printed without a traceback."""
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

        sys.stderr.write(f"{without_secrets(str(error))}\n")
        return error.exit_code
    except StopRequested as stop:
        sys.stderr.write(f"stopped by {stop.signal_name} before there was anything to save\n")
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
    from trietune.config.secrets import without_secrets

    with tempfile.NamedTemporaryFile(
        "w", prefix="trietune-error-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(str(without_secrets("".join(traceback.format_exception(error)))))
    sys.stderr.write(
        f"error: a bug in TrieTune: {type(error).__name__}: {without_secrets(str(error))[:300]}\n"
        f"       the whole traceback is in {file.name}\n"
        "next:  please report it with that file and the output of `trietune doctor`\n"
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

    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("trietune").setLevel(level)


class _console:  # noqa: N801  (reads as a function)
    """A tracker that writes to the console alone, closed at the end."""

    def __enter__(self) -> Any:
        from trietune.tracking.open import open_tracker

        self.hub = open_tracker(tracker="none", writes_files=False)
        return self.hub

    def __exit__(self, *exception: object) -> None:
        self.hub.close()


def _number_of_processes(nproc: str | None) -> int:
    """What `--nproc` asks for; `auto` is one process for each CUDA device, said."""
    if nproc is None:
        return 1
    refuse_several_processes()
    if nproc == "auto":
        import torch

        found = torch.cuda.device_count()
        typer.echo(
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
    with _console() as hub, StopSignals() as signals, as_one_of(num_processes):
        prepared = prepare(settings, hub, signals.check, num_processes=num_processes)
    if as_json:
        _print_json({"plan": dict(prepared.plan.lines()), "num_steps": prepared.plan.num_steps})
        return
    for line in columns(prepared.plan.lines()):
        typer.echo(line)


def _print_json(document: dict[str, Any]) -> None:
    from trietune.tracking.jsonl import plain

    typer.echo(json.dumps(plain({"schema_version": JSON_VERSION, **document}), ensure_ascii=False, allow_nan=False))


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
    if path is None and (has_text or sys.stdin.isatty()):
        return
    is_stdin = path is None or str(path) == "-"
    try:
        lines = sys.stdin.read().splitlines() if is_stdin else path.read_text("utf-8").splitlines()  # type: ignore[union-attr]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`--input {path}` cannot be read: {error}", next_step="check the path") from error
    is_json = (path is not None and path.suffix == ".jsonl") or (is_stdin and bool(lines) and lines[0].startswith("{"))
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line) if is_json else line
        except ValueError as error:
            raise UserError(f"{path or 'stdin'}:{number} is not JSON: {error}") from error


def _answer_line(record: dict[str, Any]) -> str:
    if "label" not in record:
        return str(record["text"])
    others = "  ".join(f"{name} {share:.1%}" for name, share in record["probabilities"].items())
    return f"{record['label']}\t{others}"


def _chat(opened: Opened, max_new_tokens: int) -> None:
    """Ask and answer until the end of input; adapters that were not trained on chats answer one text at a time."""
    from trietune.data.examples import Message
    from trietune.evaluation.predict import answer_turn
    from trietune.run.opened import predict as ask

    encoder = opened.encoder()
    is_chat = encoder.prompt_format.kind == "chat"
    typer.echo(f"{opened.name}: write a line; Ctrl-D ends" + ("; `/new` begins anew" if is_chat else ""), err=True)
    messages: list[Message] = []
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo("", err=True)
            return
        if not line:
            continue
        if line == "/new":
            messages = []
            continue
        try:
            if not is_chat:
                typer.echo(_answer_line(ask(opened, [line], max_new_tokens=max_new_tokens)[0]))
                continue
            messages = [*messages, Message("user", line)]
            turn = answer_turn(
                opened.model,
                encoder,
                messages,
                max_nodes=opened.max_positions,
                max_new_tokens=max_new_tokens,
                on_text=lambda piece: typer.echo(piece, nl=False),
            )
            typer.echo("")
            messages = [*messages, turn]
        except UserError as error:
            typer.echo(str(error), err=True)


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
