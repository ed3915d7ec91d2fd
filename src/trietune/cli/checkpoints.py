"""`trietune checkpoints`, `verify` and `sync`: what a run has saved, here and in its storage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trietune.cli.options import AsJson, RunFolder
from trietune.cli.printing import print_json, say, say_line
from trietune.cli.streams import verdict
from trietune.errors import EXIT_BUG, EXIT_DONE, EXIT_UPLOAD_INCOMPLETE, UserError
from trietune.io.places import real_path
from trietune.io.run_folders import which_run

if TYPE_CHECKING:
    from trietune.checkpoints.remote.copies import RemoteRun
    from trietune.checkpoints.store import CheckpointStore
    from trietune.config.settings import Settings


def checkpoints(run: RunFolder, as_json: AsJson = False) -> None:
    """List a run's checkpoints: step, metric, size, whole or damaged, where, best."""
    from trietune.checkpoints.overview import list_checkpoints
    from trietune.io.columns import columns

    store, remote, settings = _open_store(run)
    rows = list_checkpoints(store, remote)
    if as_json:
        print_json({"run": str(run), "metric": store.metric, "checkpoints": [row.as_json() for row in rows]})
        return
    if not rows:
        say_line(f"{run} has no checkpoints")
        return
    table = [("step", settings.checkpoint_metric, "size", "state", "where", "")]
    for row in rows:
        value = "-" if row.metric is None else f"{row.metric:.4g}"
        state = "whole" if row.damage is None else f"damaged: {row.damage}"
        table.append(
            (f"{row.step:,}", value, f"{row.size_bytes / 1e6:.1f} MB", state, row.place, "best" if row.is_best else "")
        )
    for line in columns(table):
        say_line(line)


def verify(
    path: Annotated[Path, typer.Argument(help="A checkpoint, an adapter, or a run's folder.")], as_json: AsJson = False
) -> None:
    """Prove that checkpoints and adapters are whole: every byte against its manifest."""
    from trietune.checkpoints.overview import verify_path

    proofs = verify_path(path)
    with verdict(EXIT_BUG if any(proof.damage is not None for proof in proofs) else EXIT_DONE):
        if as_json:
            print_json(
                {"proofs": [{"path": str(p.path), "step": p.step, "size_bytes": p.size_bytes, "damage": p.damage,
                             "extra": list(p.extra)} for p in proofs]}
            )  # fmt: skip
            return
        for proof in proofs:
            state = f"whole, {proof.size_bytes:,} bytes" if proof.damage is None else f"damaged: {proof.damage}"
            also = f"; beside it: {', '.join(proof.extra)}" if proof.extra else ""
            say_line(f"{proof.path}: {state}{also}")


def sync(run: RunFolder) -> None:
    """Upload what the storage does not have yet: checkpoints, the final adapter, the run's files."""
    from trietune.checkpoints.lock import RunLock
    from trietune.checkpoints.remote.uploads import synchronize

    store, remote, _ = _open_store(run)
    if remote is None:
        raise UserError(
            f"{run} has no storage to upload to",
            where=f"`remote_path` is empty in {run / 'config.yaml'}",
            next_step=f"write `storage_backend` and `remote_path` there, then `trietune sync {run}`",
        )
    with RunLock(run):
        try:
            result = synchronize(store, remote)
        except UserError:
            raise
        except Exception as error:
            say(f"error: {remote.location}: {error}\nnext:  run the same command to try again", err=True)
            raise typer.Exit(EXIT_UPLOAD_INCOMPLETE) from error
    for warning in result.warnings:
        say_line(f"warning: {warning}", err=True)
    say(f"{remote.location}: {len(result.uploaded)} uploaded" + "".join(f"\n  {n}" for n in result.uploaded))


def _open_store(run: Path) -> tuple[CheckpointStore, RemoteRun | None, Settings]:
    from trietune.checkpoints.overview import read_run_id
    from trietune.checkpoints.remote.open import open_remote
    from trietune.checkpoints.store import CheckpointStore
    from trietune.config import load_config

    if not (run / "config.yaml").is_file():
        raise UserError(f"`{run}` is not a run: it has no config.yaml", next_step=which_run(run))
    settings = load_config(run / "config.yaml", ())
    store = CheckpointStore(
        run_directory=run,
        run_id=read_run_id(run),
        keep_last_n=settings.keep_last_n,
        keep_best_n=settings.keep_best_n,
        metric=settings.checkpoint_metric,
        mode=settings.checkpoint_metric_mode,
    )
    return store, open_remote(settings.storage_backend, settings.remote_path, real_path(run).name), settings
