"""What a run keeps, where several ranks train it: rank 0 reads and writes, all of them know.

The bytes of a checkpoint that is resumed go to every rank in a message, so only rank 0 needs the run's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from trietune.checkpoints.store import LoadedCheckpoint
from trietune.io.json_types import JsonObject
from trietune.ranks.ranks import ALONE, Ranks
from trietune.run.saving import RunFiles

if TYPE_CHECKING:
    from trietune.run.prepared import Prepared
    from trietune.tracking.tracker import Tracker

P = ParamSpec("P")
R = TypeVar("R")


def open_run_files(prepared: Prepared, tracker: Tracker, ranks: Ranks) -> RunFiles:
    """The files of a run; with several ranks, those of rank 0 for all."""
    return RunFiles(prepared, tracker) if ranks is ALONE else SharedRunFiles(prepared, tracker, ranks)


def _by_rank_0(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[object, P], R]:
    """The method, called by rank 0; all ranks get what it returned."""

    def shared(files: Any, /, *arguments: P.args, **named: P.kwargs) -> R:
        value: R = files.ranks.once(lambda: method(files, *arguments, **named))
        return value

    return shared


class SharedRunFiles(RunFiles):
    """Run files whose files are rank 0's; every method is called by all ranks and gives all of them rank 0's result."""

    def __init__(self, prepared: Prepared, tracker: Tracker, ranks: Ranks) -> None:
        self.ranks = ranks
        self.settings = prepared.settings
        self.prepared = prepared
        self.directory = prepared.plan.directory
        self.tracker = tracker
        self._uploader = None
        self.saved_step = None

        def open_files() -> JsonObject:
            super(SharedRunFiles, self).__init__(prepared, tracker)
            described: JsonObject = self.environment
            return described

        self.environment = ranks.once(open_files)

    def finished(self, allowed_changes: frozenset[str]) -> tuple[int, str] | None:
        found = self.ranks.once(lambda: super(SharedRunFiles, self).finished(allowed_changes))
        return None if found is None else (found[0], found[1])

    def find_checkpoint(self, allowed_changes: frozenset[str]) -> LoadedCheckpoint | None:
        found: list[LoadedCheckpoint | None] = []

        def find() -> JsonObject | None:
            loaded = super(SharedRunFiles, self).find_checkpoint(allowed_changes)
            found.append(loaded)
            if loaded is None:
                return None
            return {
                "path": loaded.path,
                "step": loaded.step,
                "run_id": loaded.run_id,
                "metrics": dict(loaded.metrics),
                "details": dict(loaded.details),
                "contents": dict(loaded.contents),
                "notes": list(loaded.notes),
                "left_out": sorted(loaded.left_out),
            }

        sent = self.ranks.once(find)
        if found:
            return found[0]
        if sent is None:
            return None
        return LoadedCheckpoint(
            **{**sent, "notes": tuple(sent["notes"]), "left_out": frozenset(sent["left_out"])}
        )  # fmt: skip

    def start(self, resumed: LoadedCheckpoint | None) -> None:
        self.ranks.once(lambda: super(SharedRunFiles, self).start(resumed))
        if resumed is not None:
            self.saved_step = resumed.step
            self.ranks.saved(str(resumed.path))

    def move_to(self, directory: Path) -> None:
        self.directory = directory
        self.ranks.once(lambda: super(SharedRunFiles, self).move_to(directory))

    def save(self, step: int, *arguments: Any, **named: Any) -> float:
        self.ranks.at("saving", step)

        def write() -> tuple[float, int | None]:
            seconds = super(SharedRunFiles, self).save(step, *arguments, **named)
            self._note_saved()
            return seconds, self.saved_step

        seconds, self.saved_step = self.ranks.once(write)
        self._note_saved()
        return seconds

    def _note_saved(self) -> None:
        """On rank 0 before the others are told, too: one of them may be lost by then."""
        if self.saved_step is not None:
            self.ranks.saved(f"checkpoints/step-{self.saved_step:08d}")

    def better_than_last(self, step: int, metrics: Mapping[str, float]) -> tuple[int, bytes] | None:
        better = self.ranks.once(lambda: super(SharedRunFiles, self).better_than_last(step, metrics))
        return None if better is None else (better[0], better[1])

    def write_adapter(self, step: int, *arguments: Any, **named: Any) -> Path:
        self.ranks.at("saving", step)
        return self.ranks.once(lambda: super(SharedRunFiles, self).write_adapter(step, *arguments, **named))

    def tell_uploads(self) -> None:
        self.ranks.on_first(super().tell_uploads)

    is_comparable = _by_rank_0(RunFiles.is_comparable)
    finish_uploads = _by_rank_0(RunFiles.finish_uploads)
    push_to_hub = _by_rank_0(RunFiles.push_to_hub)
