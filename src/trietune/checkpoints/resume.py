"""Going on from a checkpoint: what differs between then and now, and log lines of steps that will be taken again.

Differences come in three kinds. Some settings cannot change what is learned and are not mentioned. Some change it
within rounding, or change only what is reported: they are said. All others, unknown keys included,
refuse the resume unless the user allowed them by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trietune.checkpoints import messages
from trietune.errors import EXIT_RESUME_REFUSED, UserError
from trietune.io import disk_errors, files, strict_json
from trietune.io.columns import columns
from trietune.io.directory import DamagedDirectory, read_manifest
from trietune.io.json_types import JsonMapping, JsonObject

_NOT_MENTIONED = {
    "card_example", "checkpoint_path", "epoch_freq", "keep_best_n", "keep_last_n", "load_from_storage",
    "log_level", "max_time", "measured_on", "model_to_wandb", "on_save_error", "print_examples", "project_dir",
    "push_to_hub", "remote_path",
    "resume_from_checkpoint", "resume_option", "run_decode_example", "save_optim", "save_strategy", "self_check",
    "steps_freq", "storage_backend", "sync_to_storage", "test_config", "tracker", "use_wandb", "val_steps_freq",
    "wandb_log_freq", "wandb_project", "wandb_run_name", "wandb_tags", "wandb_watch_mode",
}  # fmt: skip

_ROUNDING = "the same numbers up to rounding, not the same bits"
_ELSEWHERE = "the same contents in another place"
_REPORTED = "reported metrics change, and checkpoints are not ranked against earlier ones"
# What dropout takes out is drawn for each micro-batch, in the order in which layers ask.
_REDRAWN = "dropout draws different masks from here on, so the numbers differ"
_DRAWN_BY = {"batching", "device", "fused_layers", "max_tokens_per_micro_batch"}
_WARNED = {
    "attention": _ROUNDING,
    "batching": _ROUNDING,
    "checkpoint_metric": "`best` now refers to another metric",
    "checkpoint_metric_mode": "`best` now refers to the other end of the metric",
    "deterministic": _ROUNDING,
    "enable_trace": _ROUNDING,
    "fused_layers": _ROUNDING,
    "device": _ROUNDING,
    "early_stopping_patience": "training may end at another step",
    "early_stopping_threshold": "training may end at another step",
    "eval_batch_size": _ROUNDING,
    "eval_max_examples": _REPORTED,
    "gradient_checkpointing": _ROUNDING,
    "max_tokens_per_micro_batch": _ROUNDING,
    "input_sharding_dim": _ROUNDING,
    "mesh_axis_names": _ROUNDING,
    "mesh_shape": _ROUNDING,
    "model_sharding_patterns": _ROUNDING,
    "num_threads": _ROUNDING,
    "pack_weights": _ROUNDING,
    "parallelism_strategy": _ROUNDING,
    "tp_sharding_specs": _ROUNDING,
    "trace_region_size_mb": _ROUNDING,
    "use_tt": _ROUNDING,
    "validation_file": _REPORTED,
    "validation_fingerprint": _REPORTED,
    "xla_compile_options": _ROUNDING,
    "world_size": f"{_ROUNDING}; dropout masks are drawn by rank",
}
_WARNED_PREFIXES = {"versions.": "may not give the same bits", "machine.": _ROUNDING}
# Where something lies says nothing about what it is: with these fingerprints equal, another place is the same training.
_FINGERPRINTS = {
    "train_file": "data_fingerprint",
    "dataset_id": "data_fingerprint",
    "validation_file": "validation_fingerprint",
    "model_name": "base_digest",
    "base_model": "base_digest",
}
_LENGTH_OF_RUN = {"num_epochs", "max_steps"}
WARMUP_IN_EFFECT = "warm-up in effect"
_DECIDE_WARMUP = frozenset(
    {"num_epochs", "max_steps", "warmup_ratio", "warmup_steps", "batch_size", "gradient_accumulation_steps",
     "max_train_examples", "data_fingerprint"}
)  # fmt: skip
_MISSING = object()


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it was. `verdict`: `warn` and `allowed` continue, `refuse` does not."""

    key: str
    saved: str
    current: str
    verdict: Literal["warn", "allowed", "refuse"]
    effect: str


@dataclass(frozen=True, slots=True)
class AbandonedLines:
    """What `abandon_lines` moved: how many lines beyond the step, and the file they and torn lines went to."""

    num_beyond: int
    path: Path | None


def compare(saved: JsonMapping, current: JsonMapping, allowed: Collection[str] = ()) -> list[Difference]:
    """What differs, in the order of the keys.

    Args:
        saved: the `details` of a checkpoint: config keys as they are, and what surrounds them, such as
            `data_fingerprint`, `base_model`, `base_revision`, `tokenizer`, `num_threads`, `world_size`,
            `versions.torch`, `machine.cpu`.
        current: the same of this start.
        allowed: keys whose differences the user accepts.
    """
    differences = []
    for key in sorted(saved.keys() | current.keys()):
        before, now = saved.get(key, _MISSING), current.get(key, _MISSING)
        if key in _NOT_MENTIONED or _plain(before) == _plain(now):
            continue
        # Beside `train_file`, checkpoints of 0.1.0 name a data set that was never read; the bytes of the data decide.
        if key == "dataset_id" and None in (before, now) and _has_same_data(saved, current):
            continue
        fingerprint = _FINGERPRINTS.get(key, "")
        if saved.get(fingerprint) and saved.get(fingerprint) == current.get(fingerprint):
            differences.append(Difference(key, _shown(before), _shown(now), "warn", _ELSEWHERE))
            continue
        effect = _effect_of_a_harmless_change(key, before, now, current)
        verdict: Literal["warn", "allowed", "refuse"] = "warn"
        if effect is None:
            verdict = "allowed" if key in allowed else "refuse"
            effect = "training differs from here on"
        differences.append(Difference(key, _shown(before), _shown(now), verdict, effect))
    return differences


def compare_warmup(before: int | None, now: int, step: int, allowed: Collection[str] = ()) -> list[Difference]:
    """Whether the steps of warm-up differ.

    A share of all steps grows with their number: a longer run would fall back below a rate that it had reached.

    Args:
        before: steps of warm-up in the run that saved the checkpoint; None if unknown.
        step: step of the checkpoint.
        allowed: keys whose differences the user accepts; any that decides the number of steps accepts this one.
    """
    if before is None or before == now:
        return []
    accepted = _DECIDE_WARMUP.intersection(allowed)
    effect = "a different learning rate at steps already taken" if step else "a different learning rate from here on"
    verdict: Literal["allowed", "refuse"] = "allowed" if accepted else "refuse"
    return [Difference(WARMUP_IN_EFFECT, f"{before} steps", f"{now} steps", verdict, effect)]


def check_differences(differences: Sequence[Difference], checkpoint: Path) -> None:
    """Raise `UserError` (exit code 6) with a table when any difference refuses; nothing was changed by then."""
    refused = [item for item in differences if item.verdict == "refuse"]
    if not refused:
        return
    table = "\n       ".join(table_lines(refused))
    names = " ".join(dict.fromkeys(f"--allow-change {_allowed_as(item.key, differences)}" for item in refused))
    raise UserError(
        f"this is not the training that {checkpoint.name} belongs to: {len(refused)} "
        f"{'setting differs' if len(refused) == 1 else 'settings differ'}",
        where=f"{table}\n       nothing was changed",
        next_step=f"set {'it' if len(refused) == 1 else 'them'} back, or accept it by name: `{names}`",
        exit_code=EXIT_RESUME_REFUSED,
    )


def _allowed_as(key: str, differences: Sequence[Difference]) -> str:
    """The key by which a difference is accepted: of the warm-up, the one that changed it."""
    if key != WARMUP_IN_EFFECT:
        return key
    return next((item.key for item in differences if item.key in _DECIDE_WARMUP), "num_epochs")


def table_lines(differences: Sequence[Difference]) -> list[str]:
    """A table for people: key, then, now, and what follows."""
    rows = [("", "checkpoint", "now", "")]
    rows += [(item.key, item.saved, item.current, item.effect) for item in differences]
    return columns(rows)


def abandon_lines(path: Path, after_step: int) -> AbandonedLines:
    """Move the lines of a JSONL file whose `step` is beyond `after_step` to `<name>.abandoned-<n>.jsonl` beside it.

    Lines that are not JSON objects go too: a kill can tear the last one. Lines without a step stay. Both files change
    at once or not at all; after a crash between the two, the next call finds its abandoned file and continues.
    Raises `UserError` when the disk refuses.
    """
    if not path.exists():
        return AbandonedLines(0, None)
    kept: list[bytes] = []
    surplus: list[bytes] = []
    num_beyond = 0
    data = path.read_bytes()
    for line in data.splitlines(keepends=True):
        event = _parse_line(line)
        is_beyond = event is not None and isinstance(step := event.get("step"), int) and step > after_step
        num_beyond += is_beyond
        (surplus if event is None or is_beyond else kept).append(line.rstrip(b"\r\n") + b"\n")
    repaired = b"".join(kept)
    if repaired == data:
        return AbandonedLines(0, None)
    try:
        abandoned = _keep_abandoned(path, b"".join(surplus)) if surplus else None
        files.replace_file(path, repaired)
    except OSError as error:
        raise disk_errors.start_failed(error, path) from error
    return AbandonedLines(num_beyond, abandoned)


def load_run_id(run_directory: Path) -> str | None:
    """The id in `.run-id`; None in a folder that was never signed.

    Raises:
        UserError: it holds something else, or is missing beside checkpoints or an adapter.
    """
    path = run_directory / ".run-id"
    try:
        text = path.read_text("ascii").strip()
    except FileNotFoundError:
        if found := ids_in_manifests(run_directory):
            raise messages.run_id_missing(path, found) from None
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable_id(path) from error
    if not text.isalnum() or len(text) > 200:
        raise _unreadable_id(path)
    return text


def ids_in_manifests(run_directory: Path) -> list[str]:
    """The ids that checkpoints and the final adapter of a folder name, each once."""
    found = []
    for path in [*sorted(run_directory.glob("checkpoints/*step-*")), run_directory / "adapter"]:
        with contextlib.suppress(DamagedDirectory, OSError):
            found.append(read_manifest(path).info.run_id)
    return list(dict.fromkeys(found))


def new_run_id() -> str:
    """An id that no other run has."""
    return secrets.token_hex(16)


def keep_run_id(run_directory: Path, run_id: str) -> None:
    """Write `.run-id`. Raises `UserError` when the disk refuses."""
    path = run_directory / ".run-id"
    try:
        files.replace_file(path, f"{run_id}\n".encode())
    except OSError as error:
        raise disk_errors.start_failed(error, path) from error


def _effect_of_a_harmless_change(key: str, before: object, now: object, current: JsonMapping) -> str | None:
    if before is _MISSING or now is _MISSING:
        return "known on one side only, so it cannot be compared"
    if key in _LENGTH_OF_RUN and current.get("lr_scheduler_type", "constant") == "constant":
        return "the run ends at another step; nothing changes before that"
    if key in _DRAWN_BY and (current.get("lora_dropout") or current.get("base_dropout")):
        return _REDRAWN
    for prefix, effect in _WARNED_PREFIXES.items():
        if key.startswith(prefix):
            return effect
    return _WARNED.get(key)


def _has_same_data(saved: JsonMapping, current: JsonMapping) -> bool:
    fingerprint = saved.get("data_fingerprint")
    return fingerprint is not None and fingerprint == current.get("data_fingerprint")


def _plain(value: object) -> object:
    """As JSON would give it back, so that a tuple equals the list that it became."""
    return value if value is _MISSING else json.loads(strict_json.serialize(strict_json.without_nan(value)))


def _shown(value: object) -> str:
    if value is _MISSING:
        return "-"
    text = value if isinstance(value, str) else json.dumps(strict_json.without_nan(value), ensure_ascii=False)
    return text if len(text) <= 48 else f"{text[:22]}...{text[-22:]}"


def _parse_line(line: bytes) -> JsonObject | None:
    try:
        event = strict_json.parse(line)
    except strict_json.NotStrict:
        return None
    return event if isinstance(event, dict) else None


def _keep_abandoned(path: Path, data: bytes) -> Path:
    number = 1
    while os.path.lexists(abandoned := path.with_name(f"{path.stem}.abandoned-{number}{path.suffix}")):
        if abandoned.is_file() and abandoned.read_bytes() == data:
            return abandoned
        number += 1
    files.replace_file(abandoned, data)
    return abandoned


def _unreadable_id(path: Path) -> UserError:
    return UserError(
        f"{path} does not hold the id of a run",
        where="it ties checkpoints and remote copies to this run",
        next_step="write into it the `run_id` of `checkpoints/step-.../manifest.json`, or remove it if there is none",
        exit_code=EXIT_RESUME_REFUSED,
    )
