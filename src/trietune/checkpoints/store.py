"""The checkpoints of one run: save, list, load, retain.

    <run>/checkpoints/step-00000050/             whole or absent
                      step-00000100/
                      abandoned-1-step-.../      newer than the one a run went back to; kept for you, read by nothing
                      .damaged-step-.../         stood in the way of a save and was not whole; kept for you
                      .staging- .removed- .replaced-    of a write or a removal under way

There is no pointer to the latest: what exists is read from disk each time, and order is by step, never by the clock.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trietune.checkpoints import messages, retention
from trietune.checkpoints.measured import measured_on
from trietune.checkpoints.retention import STEP_NAME, Mode, Ranked, step_name
from trietune.io import directory, disk_errors, files
from trietune.io.directory import DamagedDirectory, FileContent
from trietune.io.disk_errors import SaveFailed
from trietune.io.json_types import JsonMapping
from trietune.io.manifest import Manifest, ManifestInfo
from trietune.io.places import real_path

ResumeOption = Literal["last", "best", "path"]

# What this package stages in the run directory itself; nothing else there is ever cleaned.
_STAGED_IN_RUN = re.compile(r"adapter|probe|\.run-id|[a-z]+(\.abandoned-[0-9]+)?\.(jsonl|json|yaml|html)", re.ASCII)

_STAGED_BESIDE_STEPS = re.compile(rf"{STEP_NAME.pattern}|probe", re.ASCII)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the disk says about one `step-*` folder; `damage` is None when the quick look found nothing wrong."""

    path: Path
    step: int
    manifest: Manifest | None
    damage: DamagedDirectory | None = None

    @property
    def metrics(self) -> Mapping[str, float | int | None]:
        return self.manifest.info.metrics if self.manifest else {}


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A save that is on disk for good; `warnings` are sentences about what else happened on the way."""

    path: Path
    step: int
    removed: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A checkpoint whose bytes were verified as they were read; `notes` say what was passed over and why.

    `left_out` names files that were damaged and that the caller could do without; `contents` lacks them.
    """

    path: Path
    step: int
    run_id: str
    metrics: Mapping[str, float | int | None]
    details: JsonMapping
    contents: dict[str, bytes]
    notes: tuple[str, ...] = ()
    left_out: frozenset[str] = frozenset()

    def take(self, name: str) -> bytes:
        """The bytes of a file, forgotten here, so that they go when the caller has made something of them."""
        return self.contents.pop(name)


@dataclass(slots=True)
class CheckpointStore:
    """The checkpoints of the run in `run_directory`; hold its `RunLock` to call anything that writes.

    Args:
        run_id: id of this run; checkpoints that name another are shown as foreign and left alone.
        metric: the key of a checkpoint's metrics that `keep_best_n` and `best` look at.
        measured_on: what this run measures on; values measured on something else are not compared with its own.
        details: details of this run, to tell what older checkpoints were measured on.
    """

    run_directory: Path
    run_id: str
    keep_last_n: int
    keep_best_n: int
    metric: str
    mode: Mode
    measured_on: str = ""
    details: JsonMapping = field(default_factory=dict)
    _pins: dict[int, int] = field(default_factory=dict)
    _resumed_step: int | None = None
    _known_whole: set[int] = field(default_factory=set)
    _guard: threading.RLock = field(default_factory=threading.RLock)

    @property
    def folder(self) -> Path:
        return self.run_directory / "checkpoints"

    def save(
        self,
        step: int,
        contents: Mapping[str, FileContent],
        *,
        metrics: Mapping[str, float | int | None] | None = None,
        details: JsonMapping | None = None,
        flush_first: Sequence[Path] = (),
    ) -> SavedCheckpoint:
        """Write the checkpoint of `step`, then remove what the limits no longer keep.

        Args:
            metrics: measured on exactly these weights; NaN and infinities are kept as null and never rank.
            details: what `resume.compare` looks at; plain JSON values.
            flush_first: files, such as `metrics.jsonl`, that must reach the device before the checkpoint does.

        Raises:
            SaveFailed: the disk refused. Earlier checkpoints are as they were, and the next save starts over.
        """
        info = ManifestInfo(run_id=self.run_id, step=step, metrics=metrics or {}, details=details or {})
        target = self.folder / step_name(step)
        warnings: list[str] = []
        try:
            files.make_folders(self.folder)
            for path in flush_first:
                if path.exists() and not _flush_if_plain(path):
                    warnings.append(f"{path.name} is no longer a plain file, and the log in it may be lost")
            written = directory.write_directory(target, contents, info=info)
        except (OSError, SaveFailed) as error:
            failure = error if isinstance(error, SaveFailed) else disk_errors.save_failed(error, target)
            raise messages.checkpoint_not_saved(failure, newest_whole=self._newest_whole()) from error
        if written.moved_aside:
            warnings.append(f"{target.name} was there already and was not whole; it is now {written.moved_aside.name}")
        self._known_whole.add(step)
        self._resumed_step = None
        removed: list[Path] = []
        try:
            warnings += self._retain(removed)
        except OSError as error:
            warnings.append(messages.removal_failed(error))
        return SavedCheckpoint(
            path=target,
            step=step,
            removed=tuple(removed),
            warnings=tuple(warnings),
        )

    def scan(self, *, without: Collection[str] = ()) -> list[Checkpoint]:
        """Every `step-*` entry, oldest step first, after a quick look (manifest, and sizes but of files `without`)."""
        found = []
        for path in _step_entries(self.folder):
            step = step_of(path)
            try:
                manifest = directory.check_sizes(path, without=without)
                self._check_identity(path, step, manifest)
                found.append(Checkpoint(path, step, manifest))
            except DamagedDirectory as damage:
                if damage.file == "it" and not os.path.lexists(path):
                    continue  # removed between the listing and the look
                found.append(Checkpoint(path, step, None, damage))
        return found

    def best(self) -> Checkpoint | None:
        """The best by `checkpoint_metric` of those that look whole and were measured on what this run measures on."""
        by_step = {item.step: item for item in self.scan()}
        ranked = self._ranked(list(by_step.values()))
        if self.measured_on:
            ranked = [item for item in ranked if item.measured_on == self.measured_on]
        best = retention.best_first(ranked, self.mode, self.measured_on)
        return by_step[best[0].step] if best else None

    def ranked(self, step: int, manifest: Manifest | None, *, is_whole: bool = True) -> Ranked:
        """What the policy looks at, of a checkpoint here or a copy elsewhere."""
        if manifest is None:
            return Ranked(step, None, is_whole)
        info = manifest.info
        on = measured_on(info.details, current=self.measured_on, current_settings=self.details)
        return Ranked(step, info.metrics.get(self.metric), is_whole, on)

    def is_comparable(self, details: JsonMapping) -> bool:
        """Whether a checkpoint with these details was measured on what this run measures on."""
        return measured_on(details, current=self.measured_on, current_settings=self.details) == self.measured_on

    def load(
        self,
        option: ResumeOption = "last",
        path: Path | None = None,
        *,
        fresh_if_none: bool = False,
        expendable: Collection[str] = (),
    ) -> LoadedCheckpoint | None:
        """Read and verify the checkpoint to resume from; it stays pinned until the next save.

        `last` and `best` pass over damaged ones, down to the newest whole one, and say so in `notes`; `path` takes
        that one or refuses. A file named in `expendable` is left out if it is damaged, and that is said.

        Returns:
            None when no checkpoint was ever there and `fresh_if_none`.

        Raises:
            UserError: exit code 6 when what is there cannot be believed, 2 when `path` is not one of this run.
        """
        found = self.scan(without=expendable)
        if option == "path":
            return self._load_path(path, found, expendable)
        if not found:
            traces = _traces(self.folder)
            if traces or not fresh_if_none:
                raise messages.nothing_to_resume(self.folder, traces)
            return None
        order = list(reversed(found))
        notes: list[str] = []
        if option == "best":
            order, notes = self._best_before_newest(found)
        damages: list[DamagedDirectory] = []
        for checkpoint in order:
            passed_over = [messages.passed_over(damage, checkpoint.path) for damage in damages]
            try:
                return self._read(checkpoint, expendable, notes=(*notes, *passed_over))
            except DamagedDirectory as damage:
                damages.append(damage)
        raise messages.all_damaged(self.folder, damages)

    def has_traces(self) -> bool:
        """Whether a checkpoint is here, whole or not, or once was."""
        return bool(_step_entries(self.folder) or _traces(self.folder))

    def set_aside_newer(self, step: int) -> list[Path]:
        """Rename every `step-*` beyond `step` to `abandoned-<n>-step-*`, so that `last` means this line of steps.

        Newest first: stopped half-way, what is left still ends with the newest of the line that is given up.
        Returns where they went; nothing is deleted.
        """
        newer = [path for path in _step_entries(self.folder) if step_of(path) > step]
        number = 1
        while any(self.folder.glob(f"abandoned-{number}-*")):
            number += 1
        moved = []
        for path in sorted(newer, key=step_of, reverse=True):
            aside = self.folder / f"abandoned-{number}-{path.name}"
            directory.rename_directory(path, aside)
            moved.append(aside)
        return moved

    def clean_leftovers(self) -> list[Path]:
        """Clean up after a killed process, under the lock: checkpoints, the final adapter, and half-written files."""
        return [
            *directory.clean_leftovers(self.folder, _STAGED_BESIDE_STEPS),
            *directory.clean_leftovers(self.run_directory, _STAGED_IN_RUN),
        ]

    @contextlib.contextmanager
    def pinned(self, step: int) -> Iterator[bool]:
        """Keep retention off a checkpoint, from any thread; gives False when it is already gone."""
        with self._guard:
            self._pins[step] = self._pins.get(step, 0) + 1
        try:
            yield (self.folder / step_name(step)).is_dir()
        finally:
            with self._guard:
                self._pins[step] -= 1
                if not self._pins[step]:
                    del self._pins[step]

    def _retain(self, removed: list[Path]) -> list[str]:
        """Remove what the limits do not keep; returns a sentence about each one that could not be removed."""
        failures = []
        with self._guard:
            found = self.scan()
            ranked = self._ranked(found)
            while (kept := self._kept(ranked)) and not kept & self._known_whole and not self._prove_whole(max(kept)):
                ranked = [item for item in ranked if item.step != max(kept)]
            pins = set(self._pins) if self._resumed_step is None else {*self._pins, self._resumed_step}
            for step in retention.removable_steps(ranked, pinned=pins, **self._limits):
                path = self.folder / step_name(step)
                try:
                    directory.remove_directory(path)
                except OSError as error:
                    if os.path.lexists(path):
                        failures.append(messages.removal_failed(error, path))
                        continue
                    failures.append(messages.remnant_stays(error, path))
                self._known_whole.discard(step)
                removed.append(path)
        return failures

    def _kept(self, ranked: Sequence[Ranked]) -> set[int]:
        return retention.kept_steps(ranked, **self._limits)

    @property
    def _limits(self) -> retention.Limits:
        return {"keep_last_n": self.keep_last_n, "keep_best_n": self.keep_best_n, "mode": self.mode}

    def _prove_whole(self, step: int) -> bool:
        # The quick look cannot see rotten bytes. Before others go, one that stays must have been read in full.
        try:
            directory.verify_directory(self.folder / step_name(step))
        except DamagedDirectory:
            return False
        self._known_whole.add(step)
        return True

    def _ranked(self, found: Sequence[Checkpoint]) -> list[Ranked]:
        return [self.ranked(item.step, item.manifest, is_whole=item.damage is None) for item in found]

    def _best_before_newest(self, found: Sequence[Checkpoint]) -> tuple[list[Checkpoint], list[str]]:
        newest_first = list(reversed(found))
        ranked = retention.best_first(self._ranked(found), self.mode, self.measured_on)
        if not ranked:
            return newest_first, [f"no whole checkpoint has a value for `{self.metric}`; using the newest instead"]
        best = next(item for item in found if item.step == ranked[0].step)
        return [best, *(item for item in newest_first if item is not best)], []

    def _load_path(
        self, path: Path | None, found: Sequence[Checkpoint], expendable: Collection[str]
    ) -> LoadedCheckpoint:
        whole = [item.path for item in found if item.damage is None]
        if path is None:
            raise messages.path_is_empty(whole)
        chosen = next((item for item in found if real_path(item.path) == real_path(path)), None)
        if chosen is None:
            raise messages.path_is_not_ours(path, self.folder, whole)
        try:
            return self._read(chosen, expendable)
        except DamagedDirectory as damage:
            raise messages.path_is_damaged(damage, [other for other in whole if other != chosen.path]) from damage

    def _read(
        self, checkpoint: Checkpoint, expendable: Collection[str], notes: tuple[str, ...] = ()
    ) -> LoadedCheckpoint:
        left_out: set[str] = set()
        while True:
            try:
                manifest, contents = directory.read_directory(checkpoint.path, without=left_out)
                break
            except DamagedDirectory as damage:
                if damage.file not in set(expendable) - left_out:
                    raise
                left_out.add(damage.file)
                notes = (*notes, messages.left_out(damage))
        self._check_identity(checkpoint.path, checkpoint.step, manifest)
        if not left_out:
            self._known_whole.add(checkpoint.step)
        self._resumed_step = checkpoint.step
        info = manifest.info
        return LoadedCheckpoint(
            path=checkpoint.path,
            step=info.step,
            run_id=info.run_id,
            metrics=info.metrics,
            details=info.details,
            contents=contents,
            notes=notes,
            left_out=frozenset(left_out),
        )

    def _check_identity(self, path: Path, step: int, manifest: Manifest) -> None:
        info = manifest.info
        if info.step != step:
            raise DamagedDirectory(path, "manifest.json", f"says step {info.step:,}, its folder {step:,}")
        if info.kind != "checkpoint":
            raise DamagedDirectory(path, "manifest.json", f"says that this is an {info.kind}")
        if info.run_id != self.run_id:
            raise DamagedDirectory(path, "manifest.json", f"belongs to another run ({info.run_id[:40]})")

    def _newest_whole(self) -> Path | None:
        with contextlib.suppress(OSError):
            return next((item.path for item in reversed(self.scan()) if item.damage is None), None)
        return None


def _flush_if_plain(path: Path) -> bool:
    """Flush a file of the run; False for something else in its place. A pipe would wait for a writer for ever."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return False
    files.flush_file(path)
    return True


def step_of(path: Path) -> int:
    """The step that a folder's name says; ValueError for other names."""
    match = STEP_NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not the name of a checkpoint")
    return int(match["step"])


def _step_entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    # `step-0000000050` would be a second name of step 50: only the name that we write counts.
    entries = [path for path in folder.iterdir() if STEP_NAME.fullmatch(path.name)]
    return sorted((path for path in entries if path.name == step_name(step_of(path))), key=step_of)


def _traces(folder: Path) -> list[str]:
    """Names that say that a checkpoint once was here although no `step-*` is."""
    if not folder.is_dir():
        return []
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name.startswith("abandoned-") or directory.DAMAGED.fullmatch(path.name)
        or directory.REMOVED.fullmatch(path.name)
    )  # fmt: skip
