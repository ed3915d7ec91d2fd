"""What a person reads when a checkpoint cannot be saved or resumed from: what, where, what to do."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trietune.errors import EXIT_RESUME_REFUSED, UserError

if TYPE_CHECKING:
    from trietune.io.directory import Damaged

# The one file that a resume can do without, and the word with which a person allows it to.
OPTIMIZER_FILE, OPTIMIZER_STATE = "optimizer.safetensors", "optimizer_state"

_REMEDIES = {
    errno.ENOSPC: "free some space on that disk; `keep_last_n` and `keep_best_n` bound what a run keeps",
    errno.EDQUOT: "free some of your quota there; `keep_last_n` and `keep_best_n` bound what a run keeps",
    errno.EFBIG: "raise the limit of file sizes (`ulimit -f unlimited`)",
    errno.EMFILE: "raise the limit of open files (`ulimit -n 4096`)",
    errno.EACCES: "give this user the right to write there",
    errno.EPERM: "give this user the right to write there",
    errno.EROFS: "the file system went read-only: look into its log (`dmesg`), then mount it again",
    errno.EIO: "the disk failed to keep the bytes: look into its log (`dmesg`) before you trust it again",
}


class SaveFailed(UserError):  # noqa: N818  (an event that a run survives)
    """A save that the disk refused; what was saved before is as it was. `number` is the errno."""

    def __init__(self, what: str, *, where: str, next_step: str, number: int) -> None:
        super().__init__(what, where=where, next_step=next_step)
        self.number = number


def save_failed(error: OSError, target: Path) -> SaveFailed:
    """`target` could not be written; whether that matters is the caller's business."""
    return SaveFailed(
        f"{target.name} was not saved: {error.strerror or error}",
        where=f"in {target.parent}",
        next_step=_REMEDIES.get(error.errno or 0, "look at that folder and its disk"),
        number=error.errno or 0,
    )


def checkpoint_not_saved(failure: SaveFailed, *, newest_whole: Path | None) -> SaveFailed:
    """The same for one checkpoint of many, for `on_save_error`."""
    kept = f"{newest_whole.name} is whole and stays" if newest_whole else "there is no earlier one"
    return SaveFailed(
        failure.what,
        where=f"{failure.where}; {kept}",
        next_step=f"{failure.next_step}; the next save tries again",
        number=failure.number,
    )


def start_failed(error: OSError, path: Path) -> UserError:
    """A file of the run directory could not be written before the first step."""
    return UserError(
        f"{path.name} could not be written: {error.strerror or error}",
        where=f"in {path.parent}; nothing was lost",
        next_step=_REMEDIES.get(error.errno or 0, "look at that folder and its disk"),
    )


def removal_failed(error: OSError) -> str:
    """One sentence: an old checkpoint could not be removed, which harms nothing but space."""
    name = f" {Path(str(error.filename)).name}" if error.filename else ""
    return f"an old checkpoint could not be removed:{name} {error.strerror or error}; the next save tries again"


def nothing_to_resume(folder: Path, traces: Sequence[str]) -> UserError:
    """No `step-*` at all."""
    if traces:
        return UserError(
            f"no checkpoint is left in {folder}, but there were some",
            where=f"found: {', '.join(traces[:3])}",
            next_step="rename one of them back to `step-...` and look at it with `trietune verify`, "
            "or start anew under another `wandb_run_name`",
            exit_code=EXIT_RESUME_REFUSED,
        )
    return UserError(
        f"there is no checkpoint to resume from in {folder}",
        next_step="set `resume_from_checkpoint: auto` to start when there is none yet, or False to start anew",
        exit_code=EXIT_RESUME_REFUSED,
    )


def all_damaged(folder: Path, damages: Sequence[Damaged]) -> UserError:
    """Every checkpoint is damaged: never a silent fresh start."""
    shown = "\n       ".join(str(damage) for damage in damages[:5])
    more = f"\n       and {len(damages) - 5} more" if len(damages) > 5 else ""
    return UserError(
        f"none of the {len(damages)} checkpoints in {folder} is whole" if len(damages) > 1
        else f"the one checkpoint in {folder} is not whole",
        where=f"{shown}{more}\n       nothing was changed",
        next_step=_offer_without_optimizer(damages)
        or "look for a copy (`load_from_storage: True`), or start anew under another `wandb_run_name`",
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


def path_is_damaged(damage: Damaged, others: Sequence[Path]) -> UserError:
    whole = f"; {others[-1].name} is whole" if others else ""
    otherwise = f"checkpoint_path: {others[-1]}" if others else "start anew under another `wandb_run_name`"
    return UserError(
        str(damage),
        where=f"nothing was changed{whole}",
        next_step=_offer_without_optimizer([damage]) or otherwise,
        exit_code=EXIT_RESUME_REFUSED,
    )


def passed_over(damage: Damaged, chosen: Path) -> str:
    """One sentence: a damaged checkpoint was passed over for an older one."""
    sentence = f"{damage}; going on from {chosen.name}"
    if damage.file != OPTIMIZER_FILE:
        return sentence
    newer = damage.directory.name
    return f"{sentence} (`--allow-change {OPTIMIZER_STATE}` would go on from {newer} with a fresh optimizer)"


def left_out(damage: Damaged) -> str:
    """One sentence: a file was damaged, and the user allowed to do without it."""
    return f"{damage}; it is left out, as `--allow-change {OPTIMIZER_STATE}` says"


def _offer_without_optimizer(damages: Sequence[Damaged]) -> str | None:
    """Where the optimizer's state alone is damaged, the weights may still serve; only a person may decide that."""
    for damage in damages:
        if damage.file == OPTIMIZER_FILE:
            return (
                f"if the weights of {damage.directory.name} are enough: `--resume --allow-change {OPTIMIZER_STATE}` "
                "goes on from them with a fresh optimizer"
            )
    return None
