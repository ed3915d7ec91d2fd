"""What must hold of a run directory after any fault, given what its writer said before."""

from __future__ import annotations

import json
from pathlib import Path

from light_writer import contents_of, make_store, weights_at

from trietune.checkpoints import resume
from trietune.checkpoints.remote.copies import RemoteRun
from trietune.checkpoints.remote.retry import RetryPolicy
from trietune.checkpoints.remote.storage import FolderStorage
from trietune.io.directory import read_directory, verify_directory

SIZE = 20_000


def steps_said(output: str, word: str) -> list[int]:
    """The steps of all whole lines that begin with `word`."""
    lines = output.splitlines(keepends=True)
    return [int(line.split()[1]) for line in lines if line.endswith("\n") and line.startswith(f"{word} ")]


def check_run(run: Path, output: str, *, mirror: Path | None = None, size: int = SIZE) -> int:
    """Every promise of the light writer, checked by the real reader; the step that a resume would go on from.

    Raises AssertionError. Leaves the directory as it is but for the clean-up of a start.
    """
    store = make_store(run)
    for item in store.scan():
        verify_directory(item.path)
    store.clean_leftovers()
    assert store.clean_leftovers() == []
    saved = steps_said(output, "saved")
    loaded = store.load("last", fresh_if_none=True)
    if saved:
        assert loaded is not None
        assert loaded.step >= max(saved), f"acknowledged {max(saved)}, found {loaded.step}"
    if loaded is not None:
        assert dict(loaded.contents) == contents_of(weights_at(loaded.step), loaded.step, size)
        assert not [item for item in store.scan() if item.damage]
    if steps_said(output, "finished"):
        manifest, contents = read_directory(run / "adapter")
        assert contents == contents_of(weights_at(manifest.info.step), manifest.info.step, size)
    elif (run / "adapter").exists():
        verify_directory(run / "adapter")
    step = loaded.step if loaded else 0
    check_log(run / "metrics.jsonl", step)
    if mirror is not None and mirror.exists():
        check_mirror(mirror, output)
    return step


def check_log(log: Path, step: int) -> None:
    """After the cut of a resume, the log holds steps 1 to `step`, each once, with the right values."""
    resume.abandon_lines(log, step)
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    assert [event["step"] for event in events] == list(range(1, step + 1))
    if events:
        assert events[-1]["weights"] == weights_at(step).hex()


def check_mirror(mirror: Path, output: str) -> None:
    """A manifest implies its payload, and what was copied last is there."""
    remote = RemoteRun(FolderStorage(mirror), "run", RetryPolicy(sleep=lambda s: False, num_attempts=1))
    copies = {copy.step: copy for copy in remote.scan()}
    for copy in copies.values():
        if copy.manifest is not None:
            remote.download(copy)
    if copied := steps_said(output, "copied"):
        assert max(step for step, copy in copies.items() if copy.manifest is not None) >= copied[-1]
