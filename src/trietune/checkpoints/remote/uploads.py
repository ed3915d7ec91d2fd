"""Copies in the background: what is on disk and kept is, sooner or later, in the storage too.

There is no list of work that could be lost or grow: each turn compares the disk with the storage and uploads what is
missing, newest first. Work is therefore bounded by what retention keeps, survives a kill, and catches up by itself
after an outage. Removal in the storage follows the same policy, and only after an upload succeeded.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trietune.checkpoints import retention
from trietune.checkpoints.remote import retry as attempts
from trietune.checkpoints.remote.copies import RemoteCopy, RemoteRun
from trietune.checkpoints.remote.retry import RetryPolicy
from trietune.checkpoints.retention import step_name
from trietune.checkpoints.store import Checkpoint, CheckpointStore, ResumeOption
from trietune.errors import UserError
from trietune.io import directory, files, manifest
from trietune.io.directory import DamagedDirectory

RUN_FILES = ("config.yaml", "environment.json", "metrics.jsonl", "batches.jsonl", "predictions.jsonl", "report.html")


@dataclass(frozen=True, slots=True)
class SyncResult:
    """What a synchronization did. `missing` names what is still only on this machine, and `error` says why."""

    uploaded: tuple[str, ...]
    removed: tuple[str, ...]
    missing: tuple[str, ...]
    error: str | None
    warnings: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        return not self.missing and self.error is None


class Uploader:
    """Uploads in a thread of its own while training continues; call every method from the training thread.

    Args:
        resumed_step: the step that this run went on from, None at a fresh start. Copies beyond it belong to a line
            of steps that was given up; they are replaced or removed once this line has a copy of its own.
        longest_wait_s: between two attempts while the storage is away.
    """

    def __init__(
        self, store: CheckpointStore, remote: RemoteRun, *, resumed_step: int | None, longest_wait_s: float = 30.0
    ) -> None:
        self._store = store
        self._remote = remote
        self._resumed_step = resumed_step
        self._pause = RetryPolicy(sleep=lambda seconds: False, longest_wait_s=longest_wait_s, first_wait_s=1.0)
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._stopping = threading.Event()
        self._finished = threading.Event()
        self._final = False
        self._error: str | None = None
        self._uploaded: list[str] = []
        self._removed: list[str] = []
        self._thread = threading.Thread(target=self._run, name="trietune-upload", daemon=True)
        # The waits inside a request's retries end at once when the run must leave.
        remote.policy = RetryPolicy(
            sleep=self._stopping.wait,
            num_attempts=remote.policy.num_attempts,
            first_wait_s=remote.policy.first_wait_s,
            longest_wait_s=remote.policy.longest_wait_s,
        )

    def start(self) -> None:
        """Begin. Raises `UserError` when another run's copies lie there; a storage that is away is not an error."""
        self._remote.check_owner(self._store.run_id)
        self._thread.start()

    def saved(self) -> None:
        """Say that something new is on disk; returns at once."""
        self._wake.set()

    def news(self) -> list[str]:
        """Sentences for the user since the last call."""
        sentences = []
        with contextlib.suppress(queue.Empty):
            while True:
                sentences.append(self._news.get_nowait())
        return sentences

    def close(
        self, timeout_s: float = 60.0, *, final: bool = True, must_leave: Callable[[], bool] = lambda: False
    ) -> SyncResult:
        """Upload what is left, the final adapter too when `final`; waits `timeout_s` at most.

        `must_leave` is asked ten times per second, so a second signal ends the wait. What did not get through stays on
        disk whole, for `trietune sync`.
        """
        self._final = final
        self._closing.set()
        self._wake.set()
        deadline = time.monotonic() + timeout_s
        while not self._finished.wait(0.1) and time.monotonic() < deadline and not must_leave():
            pass
        was_in_time = self._finished.is_set()
        self._stopping.set()
        if not was_in_time:
            return SyncResult(
                tuple(self._uploaded), tuple(self._removed), self._names_to_upload(),
                self._error or f"not done within {timeout_s:g} s",
            )  # fmt: skip
        missing = self._names_to_upload() if self._error else ()
        return SyncResult(tuple(self._uploaded), tuple(self._removed), missing, self._error)

    def _run(self) -> None:
        _be_nice()
        num_failures = 0
        while not self._stopping.is_set():
            is_last_turn = self._closing.is_set()
            self._wake.clear()
            try:
                result = synchronize(
                    self._store,
                    self._remote,
                    resumed_step=self._resumed_step,
                    final=is_last_turn and self._final,
                    uploaded=self._uploaded,
                )
                self._removed += result.removed
                for warning in result.warnings:
                    self._news.put(warning)
                if self._error:
                    self._news.put(f"{self._remote.storage.location} is back; copies are complete again")
                self._error, num_failures = None, 0
            except Exception as error:  # a thread that dies would take the reason with it
                num_failures += 1
                self._note_failure(error)
                if attempts.is_transient(error) and not self._stopping.wait(self._pause.wait_s(num_failures)):
                    continue
            if is_last_turn:
                break
            self._wake.wait()
        self._finished.set()

    def _note_failure(self, error: Exception) -> None:
        reason = error.what if isinstance(error, UserError) else attempts.describe(error)
        if reason != self._error:
            later = "it is tried again" if attempts.is_transient(error) else "it is tried again after the next save"
            self._news.put(f"no copy in {self._remote.storage.location}: {reason}; training continues, {later}")
        self._error = reason

    def _names_to_upload(self) -> tuple[str, ...]:
        names = [item.path.name for item in self._store.scan() if item.damage is None]
        if self._final and (self._store.run_directory / "adapter").is_dir():
            names.append("adapter")
        return tuple(name for name in names if name not in self._uploaded)


def synchronize(
    store: CheckpointStore,
    remote: RemoteRun,
    *,
    resumed_step: int | None = None,
    final: bool = True,
    uploaded: list[str] | None = None,
) -> SyncResult:
    """Make the storage hold what the disk holds: the work of `Uploader`, and of `trietune sync`.

    Raises the storage's last word when it fails; what was uploaded before that stays, and is named in `uploaded`.
    """
    uploaded = [] if uploaded is None else uploaded
    warnings: list[str] = []
    failures: list[Exception] = []
    copies = remote.scan()
    remote.check_copies(store.run_id, copies)
    given_up = {copy.step for copy in copies if resumed_step is not None and copy.step > resumed_step}
    there = {copy.step: copy.manifest for copy in copies if copy.damage is None}
    while (checkpoint := _newest_missing(store, there)) is not None:
        with store.pinned(checkpoint.step) as is_there:
            if is_there:
                try:
                    remote.upload(checkpoint.path)
                    uploaded.append(checkpoint.path.name)
                except DamagedDirectory as damage:
                    warnings.append(f"not copied: {damage}")
        there[checkpoint.step] = checkpoint.manifest
        given_up.discard(checkpoint.step)
    removed = _retain(store, remote, given_up, failures)
    if final:
        _upload_rest(store, remote, uploaded)
    if failures:
        raise failures[0]
    return SyncResult(tuple(uploaded), tuple(removed), (), None, tuple(warnings))


def fetch(store: CheckpointStore, remote: RemoteRun, option: ResumeOption, path: Path | None = None) -> list[str]:
    """Bring the checkpoint that `option` means from the storage to disk, unless it is there and whole.

    The newest whole one of both places wins for `last`. Returns sentences about what was copied or passed over;
    the caller then loads from disk as ever. Raises `UserError` for a foreign run, and when the storage cannot be read.
    """
    with remote.needed_now():
        copies = remote.scan()
        remote.check_copies(store.run_id, copies)
        return _fetch(store, remote, copies, option, path)


def _fetch(
    store: CheckpointStore, remote: RemoteRun, copies: Sequence[RemoteCopy], option: ResumeOption, path: Path | None
) -> list[str]:
    notes: list[str] = []
    for copy in _candidates(store, copies, option, path):
        target = store.folder / step_name(copy.step)
        if _is_whole(target) or (option == "last" and _has_newer_whole(store, copy.step)):
            return notes
        try:
            found, contents = remote.download(copy)
        except DamagedDirectory as damage:
            notes.append(f"in {remote.storage.location}, {damage}")
            continue
        files.make_folders(store.folder)
        directory.write_directory(target, contents, info=found.info)
        notes.append(f"{target.name} was copied from {remote.storage.location}")
        return notes
    return notes


def _newest_missing(store: CheckpointStore, there: Mapping[int, manifest.Manifest | None]) -> Checkpoint | None:
    for item in reversed(store.scan()):
        if item.damage is None and there.get(item.step) != item.manifest:
            return item
    return None


def _retain(store: CheckpointStore, remote: RemoteRun, given_up: set[int], failures: list[Exception]) -> list[str]:
    """Remove copies as on disk; one that the storage does not let go is noted in `failures`, and the others go."""
    copies = remote.scan()
    on_disk = {item.step for item in store.scan()}
    whole = [copy for copy in copies if copy.damage is None and copy.step not in given_up]
    if not whole:
        return []
    ranked = [store.ranked(copy.step, copy.manifest) for copy in whole]
    removable = retention.removable_steps(
        ranked, keep_last_n=store.keep_last_n, keep_best_n=store.keep_best_n, mode=store.mode
    )
    newest = max(copy.step for copy in whole)
    unfinished = [copy.step for copy in copies if copy.manifest is None and copy.step < newest]
    has_own_line = bool(given_up) and any(copy.step in on_disk for copy in whole)
    steps = sorted({*removable, *unfinished, *(given_up if has_own_line else ())})
    removed = []
    for step in steps:
        try:
            remote.remove(step)
        except Exception as error:
            if attempts.is_transient(error):
                raise
            failures.append(error)
        else:
            removed.append(step_name(step))
    return removed


def _upload_rest(store: CheckpointStore, remote: RemoteRun, uploaded: list[str]) -> None:
    run_directory = store.run_directory
    adapter = run_directory / "adapter"
    if adapter.is_dir():
        remote.check_adapter(store.run_id, remote.adapter_manifest())
        remote.upload(adapter)
        uploaded.append("adapter")
    paths = [run_directory / name for name in RUN_FILES]
    # A link may lead to what is not the run's.
    remote.upload_plain([path for path in paths if path.is_file() and not path.is_symlink()])


def _candidates(
    store: CheckpointStore, copies: Sequence[RemoteCopy], option: ResumeOption, path: Path | None
) -> list[RemoteCopy]:
    given_up = _given_up_here(store)
    usable = [copy for copy in copies if copy.manifest and (copy.step, copy.manifest) not in given_up]
    newest_first = sorted(usable, key=lambda copy: -copy.step)
    if option == "path":
        return [copy for copy in newest_first if path is not None and step_name(copy.step) == path.name]
    if option == "best":
        ranked = [store.ranked(copy.step, copy.manifest) for copy in usable if copy.damage is None]
        best = [item.step for item in retention.best_first(ranked, store.mode, store.measured_on)[:1]]
        return sorted(newest_first, key=lambda copy: copy.step not in best)
    return newest_first


def _given_up_here(store: CheckpointStore) -> list[tuple[int, manifest.Manifest]]:
    """Checkpoints that this directory went back behind, though the storage may still hold them."""
    found = []
    for path in store.folder.glob("abandoned-*-step-*"):
        with contextlib.suppress(DamagedDirectory, OSError):
            known = directory.read_manifest(path)
            found.append((known.info.step, known))
    return found


def _is_whole(path: Path) -> bool:
    try:
        directory.verify_directory(path)
    except DamagedDirectory:
        return False
    return True


def _has_newer_whole(store: CheckpointStore, step: int) -> bool:
    return any(item.step > step and item.damage is None and _is_whole(item.path) for item in store.scan())


def _be_nice() -> None:
    # Training has the processors first; on Linux a thread has a priority of its own.
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
