"""How a run goes on: the checkpoint that is meant, what may differ from it, and whether anything is left to do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trietune.checkpoints import messages
from trietune.checkpoints.messages import OPTIMIZER_FILE, OPTIMIZER_STATE
from trietune.checkpoints.remote.uploads import fetch
from trietune.checkpoints.resume import (
    Difference,
    check_differences,
    compare,
    compare_warmup,
    table_lines,
)
from trietune.checkpoints.store import LoadedCheckpoint
from trietune.data.templates import PromptFormat
from trietune.errors import UserError
from trietune.io import strict_json
from trietune.io.directory import DamagedDirectory, verify_directory
from trietune.io.json_types import JsonMapping, JsonObject
from trietune.io.manifest import ManifestInfo
from trietune.run.plan import num_steps_of

if TYPE_CHECKING:
    from trietune.checkpoints.remote.copies import RemoteRun
    from trietune.checkpoints.store import CheckpointStore
    from trietune.config.settings import Settings
    from trietune.run.prepared import Prepared
    from trietune.tracking.tracker import Tracker

STATE_FILE, WEIGHTS_FILE, CARD_FILE = "trainer_state.json", "adapter_model.safetensors", "README.md"
PROMPT_FILE = "prompt_format.json"
# A longer or shorter plan is told apart by its steps; the key is the adapter's own.
STEPS_KEYS = (
    "trained_steps", "num_epochs", "max_steps", "stopped_early", "early_stopping_patience", "early_stopping_threshold",
)  # fmt: skip
# One formula in three kernels, whose state is the same.
SAME_STATE = {"adamw", "adamw_torch", "adamw_torch_fused"}


class Record(Protocol):
    """What a run has on disk and in its storage, and what it would compare."""

    settings: Settings
    prepared: Prepared
    directory: Path
    tracker: Tracker
    remote: RemoteRun | None
    run_id: str
    store: CheckpointStore

    def details(self) -> JsonObject:
        """What a resume compares."""

    def sign(self) -> None:
        """Write whose folder this is."""


def finished(record: Record, allowed_changes: frozenset[str]) -> tuple[int, str] | None:
    """Steps and place of the final adapter, if the run that is resumed has taken the steps of its plan.

    Asked before any checkpoint: those may be gone, or were never written. An edited model card changes nothing.

    Raises:
        UserError: it is the adapter of another training.
    """
    info, place = _adapter_info(record)
    trained = _trained_steps(info)
    if info is None or trained is None or info.run_id != record.run_id:
        return None
    if trained < record.prepared.plan.num_steps and not _was_stopped_early(record, info):
        return None
    before, now = (
        {key: value for key, value in details.items() if key not in STEPS_KEYS}
        for details in (info.details, record.details())
    )
    check_differences(compare(before, now, allowed_changes), Path(place))
    return trained, place


def _was_stopped_early(record: Record, info: ManifestInfo) -> bool:
    """Whether patience ended that run, and would end it again."""
    asked = (record.settings.early_stopping_patience, record.settings.early_stopping_threshold)
    return info.details.get("stopped_early") == list(asked)


def _adapter_info(record: Record) -> tuple[ManifestInfo | None, str]:
    """What the final adapter says of itself, here or in the storage, and where it lies; None if none is whole."""
    adapter = record.directory / "adapter"
    if not record.settings.resume_from_checkpoint:
        return None, str(adapter)
    if os.path.lexists(adapter) or record.remote is None or not record.settings.load_from_storage:
        try:
            return verify_directory(adapter, without={CARD_FILE}).manifest.info, str(adapter)
        except DamagedDirectory:
            return None, str(adapter)
    found = record.remote.adapter_manifest()
    return (found.info if found is not None else None), f"{record.remote.location}/adapter"


def _check_no_adapter(record: Record) -> None:
    """Refuse to start from the beginning where an adapter would be replaced that no checkpoint leads up to."""
    info, place = _adapter_info(record)
    if info is None:
        if not os.path.lexists(place):
            return
        reason = "it is not whole, as `trietune verify` shows"
    elif info.run_id != record.run_id:
        reason = f"it belongs to another run ({info.run_id[:12]})"
    else:
        reason = f"it was trained for {_trained_steps(info)} steps, the plan has {record.prepared.plan.num_steps:,}"
    raise messages.adapter_without_checkpoint(place, reason)


def find_checkpoint(record: Record, allowed_changes: frozenset[str]) -> LoadedCheckpoint | None:
    """The checkpoint that the settings mean, read and verified; None for a fresh start.

    Raises:
        UserError: none that can be believed, or one of another training.
    """
    choice = record.settings.resume_from_checkpoint
    if not choice:
        return None
    path = Path(record.settings.checkpoint_path) if record.settings.resume_option == "path" else None
    if record.settings.load_from_storage and record.remote is not None:
        record.sign()
        for note in fetch(record.store, record.remote, record.settings.resume_option, path):
            record.tracker.info(note)
    if not record.store.has_traces():
        _check_no_adapter(record)
    expendable = {OPTIMIZER_FILE} if OPTIMIZER_STATE in allowed_changes else set()
    loaded = record.store.load(
        record.settings.resume_option, path, fresh_if_none=choice == "auto", expendable=expendable
    )
    if loaded is None:
        record.tracker.info("no checkpoint yet: starting from the beginning")
        return None
    for note in loaded.notes:
        record.tracker.warn(note)
    # A key that is newer than the checkpoint was, in effect, at its default.
    saved = {**type(record.settings)().dump_public(), **loaded.details}
    current = record.details()
    if PROMPT_FILE in loaded.contents:  # what `add_bos` did, in place of what it says
        then = PromptFormat.from_json(loaded.contents[PROMPT_FILE], where=str(loaded.path / PROMPT_FILE))
        saved["add_bos"] = str(then.bos_id is not None)
        current = {**current, "add_bos": str(record.prepared.data.prompt_format.bos_id is not None)}
    differences = [
        *compare(saved, current, allowed_changes),
        *_schedule_differences(record, loaded, allowed_changes),
    ]
    check_differences(differences, loaded.path)
    if differences:
        record.tracker.warn("settings have changed since the checkpoint:")
        for line in table_lines(differences):
            record.tracker.info(f"  {line}")
    return loaded


def begins_with_bos(directory: Path) -> bool | None:
    """Whether the texts of a run that is there began with a beginning-of-sequence token; None if nothing says it.

    `add_bos: auto` has not been the same rule in all releases, and a run goes on as it began.
    """
    for folder in (*sorted((directory / "checkpoints").glob("step-*"), reverse=True), directory / "adapter"):
        with contextlib.suppress(OSError, UserError):
            return PromptFormat.from_json((folder / PROMPT_FILE).read_bytes()).bos_id is not None
    return None


def _schedule_differences(
    record: Record, loaded: LoadedCheckpoint, allowed_changes: frozenset[str]
) -> list[Difference]:
    """Steps of warm-up are not a setting: they follow from others and from the number of examples."""
    for name in (STATE_FILE, WEIGHTS_FILE):
        if name not in loaded.contents:
            raise messages.wrong_contents(loaded.path, name, "is not among the files of its manifest")
    state = parse_state(loaded.contents[STATE_FILE], loaded.path)
    before = state.get("num_warmup_steps")
    if before is None:
        before = _warmup_before(record, loaded, state)
    return compare_warmup(before, record.prepared.plan.num_warmup_steps, loaded.step, allowed_changes)


def _warmup_before(record: Record, loaded: LoadedCheckpoint, state: JsonMapping) -> int | None:
    """Of a checkpoint that does not say it, worked out from its settings as they were planned."""
    names = ("num_epochs", "max_steps", "warmup_ratio", "warmup_steps", "batch_size", "gradient_accumulation_steps")
    if not all(name in loaded.details for name in names):
        return None
    then = record.settings.model_copy(update={name: loaded.details[name] for name in names})
    return then.num_warmup_steps(num_steps_of(then, record.prepared.plan.num_train)[1])


def why_moments_start_from_zero(record: Record, resumed: LoadedCheckpoint) -> str | None:
    if OPTIMIZER_FILE in resumed.left_out:
        return "their file is damaged"
    if OPTIMIZER_FILE not in resumed.contents:
        return "`save_optim: True` keeps them"
    kinds = {resumed.details.get("optim"), record.settings.optim}
    return None if len(kinds) == 1 or kinds <= SAME_STATE else "another `optim` keeps others"


def _trained_steps(info: ManifestInfo | None) -> int | None:
    trained = info.details.get("trained_steps") if info is not None else None
    return trained if isinstance(trained, int) else None


def parse_state(data: bytes, checkpoint: Path) -> JsonMapping:
    """`trainer_state.json`, its values of the kinds that are written. Raises `UserError` for anything else."""

    def is_count(value: object) -> bool:
        return type(value) is int and value >= 0

    def is_figure(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0

    kinds: dict[str, tuple[str, Callable[[object], bool]]] = {
        "epoch": ("a number", is_figure),
        "max_positions": ("a count", lambda value: is_count(value) and value != 0),
        "packed_bytes": ("a count", is_count),
        "num_warmup_steps": ("a count", is_count),
        "reference": ("a text", lambda value: isinstance(value, str)),
        "loss_scale": ("numbers", lambda value: isinstance(value, dict)
                       and all(type(one) in (int, float) for one in value.values())),
    }  # fmt: skip
    try:
        state = strict_json.parse(data)
    except strict_json.NotStrict as error:
        raise messages.wrong_contents(checkpoint, STATE_FILE, f"cannot be read: {error}") from error
    if not isinstance(state, dict) or "epoch" not in state:
        raise messages.wrong_contents(checkpoint, STATE_FILE, "does not say its `epoch`")
    for key, (kind, is_right) in kinds.items():
        if key in state and not (state[key] is None and key != "epoch") and not is_right(state[key]):
            raise messages.wrong_contents(checkpoint, STATE_FILE, f"has `{key}: {str(state[key])[:60]}`, not {kind}")
    return state
