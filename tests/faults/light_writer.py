"""A trainer without a model: starts in a fraction of a second, so that it can be killed hundreds of times.

    python light_writer.py RUN_DIRECTORY --until STEP [--mirror FOLDER] [--size BYTES]

Its weights at step n are a pure function of those at step n - 1, so whoever knows the step knows the bytes. It goes
on from the last checkpoint, takes steps, saves and copies, and says on standard output what has returned:
`resumed N`, `saving N`, `saved N`, `failed N ERRNO`, `removed N`, `copied N`, `finished N`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from trietune.checkpoints import resume
from trietune.checkpoints.lock import RunLock
from trietune.checkpoints.remote.copies import RemoteRun
from trietune.checkpoints.remote.retry import RetryPolicy
from trietune.checkpoints.remote.storage import FolderStorage
from trietune.checkpoints.remote.uploads import synchronize
from trietune.checkpoints.store import CheckpointStore
from trietune.io import directory, files
from trietune.io.directory import FileContent, LazyContent
from trietune.io.disk_errors import SaveFailed
from trietune.io.manifest import ManifestInfo

FIRST = b"weights at step 0"


def next_weights(weights: bytes, step: int) -> bytes:
    """One step of training."""
    return hashlib.sha256(weights + str(step).encode()).digest()


def weights_at(step: int) -> bytes:
    """What an uninterrupted run has at `step`."""
    weights = FIRST
    for number in range(1, step + 1):
        weights = next_weights(weights, number)
    return weights


def contents_of(weights: bytes, step: int, size: int) -> dict[str, bytes]:
    """The files of a checkpoint; sizes are those of a small adapter."""
    return {
        "adapter_config.json": b'{"r": 4}\n',
        "adapter_model.safetensors": (weights * (size // 32 + 1))[:size],
        "optimizer.safetensors": weights,
        "trainer_state.json": json.dumps({"step": step}).encode(),
    }


def streamed(contents: dict[str, bytes]) -> dict[str, FileContent]:
    """The same with the weights given in three pieces, as those of a large adapter are."""
    weights = contents["adapter_model.safetensors"]
    third = len(weights) // 3
    pieces = [weights[:third], weights[third : 2 * third], weights[2 * third :]]
    return {**contents, "adapter_model.safetensors": LazyContent(len(weights), lambda: iter(pieces))}


def make_store(run: Path) -> CheckpointStore:
    return CheckpointStore(run, "run1", keep_last_n=2, keep_best_n=1, metric="eval/loss", mode="min")


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--until", type=int, required=True)
    parser.add_argument("--mirror", type=Path)
    parser.add_argument("--size", type=int, default=20_000)
    parser.add_argument("--steps-per-save", type=int, default=1)
    parser.add_argument("--without", action="append", default=[], help="a function of `files` that does nothing")
    options = parser.parse_args(arguments)
    for name in options.without:
        setattr(files, name, lambda *_: None)
    options.run.mkdir(exist_ok=True)
    with RunLock(options.run):
        train(options)


def train(options: Any) -> None:
    store = make_store(options.run)
    store.clean_leftovers()
    loaded = store.load("last", fresh_if_none=True)
    step, weights = (loaded.step, loaded.contents["optimizer.safetensors"]) if loaded else (0, FIRST)
    say("resumed", step)
    log = options.run / "metrics.jsonl"
    resume.abandon_lines(log, step)
    remote = None
    if options.mirror:
        remote = RemoteRun(FolderStorage(options.mirror), "run", RetryPolicy(sleep=lambda s: False, num_attempts=1))
    while step < options.until:
        step += 1
        weights = next_weights(weights, step)
        with log.open("a") as lines:
            lines.write(json.dumps({"step": step, "weights": weights.hex()}) + "\n")
        if step % options.steps_per_save == 0 or step == options.until:
            save(store, remote, step, weights, options.size)
    info = ManifestInfo(run_id="run1", step=step, kind="adapter")
    try:
        contents = streamed(contents_of(weights, step, options.size))
        directory.write_directory(options.run / "adapter", contents, info=info)
        say("finished", step)
    except SaveFailed as error:
        say("failed", "adapter", error.number)


def save(store: CheckpointStore, remote: RemoteRun | None, step: int, weights: bytes, size: int) -> None:
    say("saving", step)
    try:
        saved = store.save(
            step, streamed(contents_of(weights, step, size)), metrics={"eval/loss": weights[0]},
            flush_first=[store.run_directory / "metrics.jsonl"],
        )  # fmt: skip
    except SaveFailed as error:
        say("failed", step, error.number)
        return
    say("saved", step)
    for path in saved.removed:
        say("removed", int(path.name[-8:]))
    for warning in saved.warnings:
        say("warning", step, warning)
    if remote is not None:
        try:
            synchronize(store, remote, final=False)
            say("copied", step)
        except OSError as error:
            say("uncopied", step, error.errno)


if __name__ == "__main__":
    main(sys.argv[1:])
