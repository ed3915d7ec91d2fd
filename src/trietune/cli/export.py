"""`trietune export`: options checked, the right kind of export called, its result in lines."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from trietune.cli.options import MaybePath, MaybeText
from trietune.cli.printing import console, say_line
from trietune.errors import UserError
from trietune.ranks.launched import refuse_several_processes

if TYPE_CHECKING:
    from trietune.model.handover.gguf_files import Quantization
    from trietune.model.handover.rules import Target
    from trietune.tracking.tracker import Tracker

TARGETS = ("transformers", "vllm", "mlx", "gguf", "ollama")
QUANTIZATIONS = ("f32", "bf16", "f16", "q8_0", "q4_k_m")


def export(
    target: Annotated[Path, typer.Argument(help="A run's folder or an adapter's.")],
    out: Annotated[MaybePath, typer.Argument(help="New folder; with --push it may be left out.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="A whole model: the adapter added to its base.")] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Fold the scale into the weights, for servers that ignore it.")
    ] = False,
    to: Annotated[
        MaybeText,
        typer.Option(
            "--to", metavar="PROGRAM", help="For gguf, ollama, vllm, mlx or transformers; read back and compared."
        ),
    ] = None,
    quantize: Annotated[
        MaybeText,
        typer.Option(metavar="FORMAT", help="For GGUF files: f32, bf16, f16, q8_0, q4_k_m."),
    ] = None,
    push: Annotated[
        MaybeText,
        typer.Option("--push", metavar="OWNER/NAME", help="Upload what is exported to this repository of the hub."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: a new repository is public.")] = False,
) -> None:
    """Copy an adapter, merge it into its base model, or write it as another program wants it."""
    refuse_several_processes()
    with console() as tracker:
        lines = _exported(
            target, out, tracker, merge=merge, plain=plain, to=to, quantize=quantize, push=push, is_public=public
        )
    for line in lines:
        say_line(line)


def _exported(
    target: Path,
    out: Path | None,
    tracker: Tracker,
    *,
    merge: bool,
    plain: bool,
    to: str | None,
    quantize: str | None,
    push: str | None,
    is_public: bool,
) -> list[str]:
    """What the command prints. Raises `UserError` for options that do not go together, and as the exports do."""
    _check(out, merge=merge, plain=plain, to=to, quantize=quantize, push=push, is_public=is_public)
    if out is not None:
        lines = _export(target, out, tracker, merge=merge, plain=plain, to=to, quantize=quantize)
        return lines if push is None else [*lines, _push(out, push, is_public=is_public)]
    assert push is not None
    with tempfile.TemporaryDirectory(prefix="trietune-export-") as folder:
        kept = Path(folder) / push.rpartition("/")[2]
        lines = _export(target, kept, tracker, merge=merge, plain=plain, to=to, quantize=quantize)
        return [*lines[1:], _push(kept, push, is_public=is_public)]


def _check(
    out: Path | None,
    *,
    merge: bool,
    plain: bool,
    to: str | None,
    quantize: str | None,
    push: str | None,
    is_public: bool,
) -> None:
    if out is None and push is None:
        raise UserError(
            "`trietune export` needs a folder to write to",
            next_step="trietune export RUN OUT   (or --push OWNER/NAME, which needs none)",
        )
    if to is not None and to not in TARGETS:
        raise UserError(f"`--to {to}` is not known", next_step=f"--to {'|'.join(TARGETS)}")
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise UserError(f"`--quantize {quantize}` is not known", next_step=f"--quantize {'|'.join(QUANTIZATIONS)}")
    if quantize is not None and to not in ("gguf", "ollama"):
        raise UserError("`--quantize` applies to GGUF files only", next_step=f"--to gguf --quantize {quantize}")
    if plain and to is not None:
        raise UserError(
            "`--plain` and `--to` do not go together: each program gets the form that it reads",
            next_step=f"leave out --plain; --to {to} folds the scale where it must",
        )
    if plain and merge:
        raise UserError(
            "`--plain` and `--merge` do not go together: a merged model has no scale", next_step="leave out --plain"
        )
    if is_public and push is None:
        raise UserError("`--public` needs `--push`", next_step="--push OWNER/NAME --public")
    if push is not None:
        from trietune.model.adapter.push import check_repository

        check_repository(push, where="--push")


def _export(
    target: Path, out: Path, tracker: Tracker, *, merge: bool, plain: bool, to: str | None, quantize: str | None
) -> list[str]:
    if merge and to is None:
        to = "transformers"
    if to is not None:
        from trietune.run.handover import export_to

        done = export_to(
            target,
            out,
            tracker,
            target=cast("Target", to),
            merge=merge,
            quantization=cast("Quantization | None", quantize),
        )
        return [
            f"{done.folder}: {done.num_bytes:,} bytes",
            f"read back, it agrees with base and adapter at {done.agreement}",
            f"(bf16 by itself keeps {done.floor})",
            *done.notes,
            *(f"use it:  {command}" for command in done.commands),
        ]
    from trietune.model.adapter.export import export_adapter

    written = export_adapter(target, out, plain=plain, report=tracker.info)
    return [f"{written.folder}: {written.num_bytes:,} bytes"]


def _push(folder: Path, repository: str, *, is_public: bool) -> str:
    from trietune.model.adapter.push import push_folder

    return f"pushed to {push_folder(folder, repository, is_public=is_public)}"
