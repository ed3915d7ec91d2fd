"""What `trietune checkpoints` lists and `trietune verify` proves."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from trietune.checkpoints import retention
from trietune.checkpoints.remote.copies import RemoteRun
from trietune.checkpoints.resume import load_run_id
from trietune.checkpoints.retention import STEP_NAME
from trietune.checkpoints.store import CheckpointStore
from trietune.errors import UserError
from trietune.io import directory
from trietune.io.adapter_place import CONFIG_FILE
from trietune.io.directory import DamagedDirectory
from trietune.io.json_types import JsonObject
from trietune.io.manifest import MANIFEST_NAME, Manifest
from trietune.io.places import real_path
from trietune.io.run_folders import which_run


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """One step, wherever it is. `damage` is None for a whole one; `metric` is the value of `checkpoint_metric`."""

    step: int
    metric: float | int | None
    size_bytes: int
    damage: str | None
    place: Literal["local", "remote", "both"]
    is_best: bool

    def as_json(self) -> JsonObject:
        """For `--json`; one flat object."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Verification:
    """The verdict on one directory: `damage` is None when every byte fits its manifest."""

    path: Path
    step: int | None
    size_bytes: int
    damage: str | None
    extra: tuple[str, ...] = ()


def list_checkpoints(store: CheckpointStore, remote: RemoteRun | None = None) -> list[CheckpointRow]:
    """Every step that the disk or the storage knows, oldest first; local ones are read and verified in full."""
    rows: dict[int, CheckpointRow] = {}
    manifests: dict[int, Manifest | None] = {}
    for copy in remote.scan() if remote else []:
        metrics = copy.manifest.info.metrics if copy.manifest else {}
        size = sum(copy.keys.values())
        manifests[copy.step] = copy.manifest
        rows[copy.step] = CheckpointRow(copy.step, metrics.get(store.metric), size, copy.damage, "remote", False)
    for item in store.scan():
        damage = item.damage or _damage_of(item.path)
        reason = f"{damage.file} {damage.reason}" if damage else None
        size = item.manifest.size_bytes if item.manifest else 0
        manifests[item.step] = item.manifest
        place: Literal["local", "both"] = "both" if item.step in rows and not rows[item.step].damage else "local"
        rows[item.step] = CheckpointRow(item.step, item.metrics.get(store.metric), size, reason, place, False)
    ranked = [store.ranked(row.step, manifests.get(row.step), is_whole=row.damage is None) for row in rows.values()]
    best = {item.step for item in retention.best_first(ranked, store.mode)[:1]}
    return [replace(rows[step], is_best=step in best) for step in sorted(rows)]


def verify_path(path: Path) -> list[Verification]:
    """Prove a checkpoint, an adapter, or all that a run directory holds. Raises `UserError` when nothing is there."""
    path = real_path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder", next_step=which_run(path))
    folders = sorted(
        entry
        for parent in (path, path / "checkpoints")
        if parent.is_dir()
        for entry in parent.iterdir()
        if STEP_NAME.fullmatch(entry.name) or (entry.name == "adapter" and entry.is_dir())
    )
    _refuse_an_export(path)
    if (path / MANIFEST_NAME).exists() or STEP_NAME.fullmatch(path.name) or not folders:
        folders = [path]
    return [_verify(folder) for folder in folders]


def _refuse_an_export(path: Path) -> None:
    """An adapter or a model without a manifest is not damaged, unless it lies in a run: nothing says what it was."""
    is_in_a_run = path.name == "adapter" and (path.parent / "config.yaml").exists()
    is_of_a_run = is_in_a_run or STEP_NAME.fullmatch(path.name)
    if is_of_a_run or os.path.lexists(path / MANIFEST_NAME):
        return
    if any((path / name).is_file() for name in (CONFIG_FILE, "config.json")):
        raise UserError(
            f"`{path}` has no {MANIFEST_NAME} to prove it by: only runs and their checkpoints and adapters have one",
            where="what `trietune export` writes, and what other programs wrote, has none",
            next_step=f"`trietune verify RUN` proves the run that it comes from; `trietune predict {path}` uses it",
        )


def read_run_id(run_directory: Path) -> str:
    """The id of an existing run, for commands that only read; empty when it never had one.

    Raises:
        UserError: `.run-id` is missing beside checkpoints or an adapter, or cannot be read.
    """
    return load_run_id(run_directory) or ""


def _verify(folder: Path) -> Verification:
    try:
        verified = directory.verify_directory(folder)
    except DamagedDirectory as damage:
        return Verification(folder, None, 0, f"{damage.file} {damage.reason}")
    info = verified.manifest.info
    match = STEP_NAME.fullmatch(folder.name)
    if match and int(match["step"]) != info.step:
        return Verification(
            folder, info.step, 0, f"{MANIFEST_NAME} says step {info.step:,}, its folder {int(match['step']):,}"
        )
    return Verification(folder, info.step, verified.manifest.size_bytes, None, verified.extra)


def _damage_of(path: Path) -> DamagedDirectory | None:
    try:
        directory.verify_directory(path)
    except DamagedDirectory as damage:
        return damage
    return None
