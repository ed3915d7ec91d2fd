"""What a person reads when a checkpoint cannot be saved or resumed from: what, where, what to do."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from trietune.errors import EXIT_RESUME_REFUSED, UserError
from trietune.io.directory import DamagedDirectory
from trietune.io.disk_errors import REMEDIES, SaveFailed

# The one file that a resume can do without, and the word with which a person allows it to.
OPTIMIZER_FILE, OPTIMIZER_STATE = "optimizer.safetensors", "optimizer_state"


def checkpoint_not_saved(failure: SaveFailed, *, newest_whole: Path | None) -> SaveFailed:
    """The same for one checkpoint of many, for `on_save_error`."""
    kept = f"{newest_whole.name} is whole and stays" if newest_whole else "there is no earlier one"
    return SaveFailed(
        failure.what,
        where=f"{failure.where}; {kept}",
        next_step=f"{failure.next_step}; the next save tries again",
        number=failure.number,
    )


def removal_failed(error: OSError, path: Path | None = None) -> str:
    """One sentence: an old checkpoint could not be removed, which harms nothing but space."""
    name = f" {path.name}" if path is not None else f" {Path(str(error.filename)).name}" if error.filename else ""
    return f"an old checkpoint could not be removed:{name} {error.strerror or error}; the next save tries again"


def remnant_stays(error: OSError, path: Path) -> str:
    """One sentence: a checkpoint is removed, but the disk keeps a file of it."""
    reason = error.strerror or error
    return f"{path.name} is removed, but a file of it stays on the disk: {reason}; the next start tries again"


def nothing_to_resume(folder: Path, traces: Sequence[str]) -> UserError:
    """No `step-*` at all."""
    if traces:
        return UserError(
            f"no checkpoint is left in {folder}, but there were some",
            where=f"found: {', '.join(traces[:3])}",
            next_step="rename one of them back to `step-...` and look at it with `trietune verify`, "
            "or start over under another `wandb_run_name`",
            exit_code=EXIT_RESUME_REFUSED,
        )
    return UserError(
        f"there is no checkpoint to resume from in {folder}",
        next_step="set `resume_from_checkpoint: auto` to start when there is none yet, or False to start over",
        exit_code=EXIT_RESUME_REFUSED,
    )


def folder_unusable(folder: Path, reason: str, number: int = 0) -> UserError:
    """What every save does was tried before the first step, and failed."""
    return UserError(
        f"checkpoints cannot be kept in {folder}: {reason}",
        where="a folder was written, renamed and read there, before the first step; nothing was trained",
        next_step=REMEDIES.get(
            number, "put `project_dir` on a file system that can rename folders, such as a local disk"
        ),
    )


def place_unusable(folder: Path, error: OSError | ValueError, where: str) -> UserError:
    """The run's folder cannot be made or written to."""
    reason, number = str(error), 0
    if isinstance(error, OSError):
        reason, number = error.strerror or reason, error.errno or 0
        for part in [*reversed(folder.parents), folder]:
            if os.path.islink(part) and not os.path.exists(part):  # noqa: PTH110, PTH114  (raise nothing)
                reason = f"{part} is a link to {part.readlink()}, which leads nowhere"
                break
            if os.path.exists(part) and not os.path.isdir(part):  # noqa: PTH110, PTH112
                reason = f"{part} is not a folder"
                break
    return UserError(
        f"the run's folder {folder} cannot be used: {reason}",
        where=f"`project_dir` ({where}); nothing was loaded",
        next_step=REMEDIES.get(number, "`--set project_dir=FOLDER` with a folder that this user may write to"),
    )


def wrong_contents(checkpoint: Path, name: str, reason: str) -> UserError:
    """The bytes are those of the manifest, and mean nothing to a run."""
    return UserError(
        f"{checkpoint.name} cannot be gone on from: {name} {reason}",
        where=f"{checkpoint / name}\n       nothing was changed",
        next_step="`resume_option: path` with `checkpoint_path` takes another checkpoint",
        exit_code=EXIT_RESUME_REFUSED,
    )


def wrong_optimizer(checkpoint: Path, reason: str) -> UserError:
    """The optimizer's file is not of this run's optimizer."""
    return UserError(
        f"{checkpoint.name} cannot be gone on from: {OPTIMIZER_FILE} is not the state of this optimizer: {reason}",
        where=str(checkpoint / OPTIMIZER_FILE),
        next_step=f"if its weights are enough: `--resume --allow-change {OPTIMIZER_STATE}` takes a fresh optimizer",
        exit_code=EXIT_RESUME_REFUSED,
    )


def run_id_missing(path: Path, ids: Sequence[str]) -> UserError:
    """Copied without its hidden files, say: what is there names its run, the folder does not."""
    several = f"; what is there belongs to {len(ids)} runs: {', '.join(ids)}" if len(ids) > 1 else ""
    return UserError(
        f"{path.parent} has lost its file .run-id, which ties checkpoints and adapter to their run",
        where=f"copying with `cp runs/x/* y/` skips hidden files{several}\n       nothing was changed",
        next_step=f"copy it too, or write it: `echo {ids[0]} > {shlex.quote(str(path))}`",
        exit_code=EXIT_RESUME_REFUSED,
    )


def folder_lost(folder: Path, now_at: Path | None) -> UserError:
    """The run's folder was moved or removed while the run wrote to it."""
    if now_at is None:
        return UserError(
            f"{folder} was removed while this run wrote to it",
            where="there is nowhere to save to",
            next_step="start the run again",
        )
    return UserError(
        f"{folder} was moved to {now_at} while this run wrote to it",
        where=f"the checkpoint of the last step is in {now_at / 'checkpoints'}",
        next_step="resume from there with `--resume`, with `project_dir` and `wandb_run_name` of the new place",
    )


def adapter_without_checkpoint(adapter: Path | str, reason: str) -> UserError:
    """Training from the beginning would replace what an earlier training made."""
    return UserError(
        f"there is a final adapter but no checkpoint to resume from: {adapter}",
        where=f"{reason}\n       nothing was changed",
        next_step="start over under another `wandb_run_name`, or move that adapter away to train it again here",
        exit_code=EXIT_RESUME_REFUSED,
    )


def all_damaged(folder: Path, damages: Sequence[DamagedDirectory]) -> UserError:
    """Every checkpoint is damaged: never a silent fresh start."""
    shown = "\n       ".join(str(damage) for damage in damages[:5])
    more = f"\n       and {len(damages) - 5} more" if len(damages) > 5 else ""
    return UserError(
        f"none of the {len(damages)} checkpoints in {folder} is whole" if len(damages) > 1
        else f"the one checkpoint in {folder} is not whole",
        where=f"{shown}{more}\n       nothing was changed",
        next_step=_offer_without_optimizer(damages)
        or "look for a copy (`load_from_storage: True`), or start over under another `wandb_run_name`",
        exit_code=EXIT_RESUME_REFUSED,
    )  # fmt: skip


def path_is_empty(whole: Sequence[Path]) -> UserError:
    return UserError(
        "`resume_option: path` needs `checkpoint_path`, which is empty",
        next_step=f"checkpoint_path: {whole[-1]}     (the newest whole one)" if whole else "resume_option: last",
    )


def path_is_not_ours(path: Path, folder: Path, whole: Sequence[Path]) -> UserError:
    reason = "is not a checkpoint of this run" if path.exists() else "does not exist"
    return UserError(
        f"`checkpoint_path: {path}` {reason}",
        where=f"`resume_option: path` takes one of the `step-...` folders in {folder}",
        next_step=f"checkpoint_path: {whole[-1]}     (the newest whole one)" if whole else "resume_option: last",
    )


def path_is_damaged(damage: DamagedDirectory, others: Sequence[Path]) -> UserError:
    whole = f"; {others[-1].name} is whole" if others else ""
    otherwise = f"checkpoint_path: {others[-1]}" if others else "start over under another `wandb_run_name`"
    return UserError(
        str(damage),
        where=f"nothing was changed{whole}",
        next_step=_offer_without_optimizer([damage]) or otherwise,
        exit_code=EXIT_RESUME_REFUSED,
    )


def passed_over(damage: DamagedDirectory, chosen: Path) -> str:
    """One sentence: a damaged checkpoint was passed over for an older one."""
    sentence = f"{damage}; resuming from {chosen.name}"
    if damage.file != OPTIMIZER_FILE:
        return sentence
    newer = damage.directory.name
    return f"{sentence} (`--allow-change {OPTIMIZER_STATE}` would resume from {newer} with a fresh optimizer)"


def left_out(damage: DamagedDirectory) -> str:
    """One sentence: a file was damaged, and the user allowed to do without it."""
    return f"{damage}; it is left out, as `--allow-change {OPTIMIZER_STATE}` says"


def _offer_without_optimizer(damages: Sequence[DamagedDirectory]) -> str | None:
    """Where only the optimizer's state is damaged, the weights may still serve; only a person may decide that."""
    for damage in damages:
        if damage.file == OPTIMIZER_FILE:
            return (
                f"if the weights of {damage.directory.name} are enough: `--resume --allow-change {OPTIMIZER_STATE}` "
                "resumes from them with a fresh optimizer"
            )
    return None
