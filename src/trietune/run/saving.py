"""What a run keeps: checkpoints, their copies, the final adapter; and how it resumes from them.

Everything on disk goes through `checkpoints`, which writes directories whole or not at all. Here it is decided what is
in them and when a difference, a damage or a full disk matters.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trietune.checkpoints import messages
from trietune.checkpoints.measured import MEASURED_ON, describe_measured_on
from trietune.checkpoints.messages import OPTIMIZER_FILE, OPTIMIZER_STATE
from trietune.checkpoints.remote.open import open_remote
from trietune.checkpoints.remote.uploads import Uploader
from trietune.checkpoints.resume import (
    abandon_lines,
    keep_run_id,
    load_run_id,
    new_run_id,
)
from trietune.checkpoints.store import CheckpointStore, LoadedCheckpoint
from trietune.errors import EXIT_DONE, EXIT_UPLOAD_INCOMPLETE, UserError
from trietune.io.causes import first_line
from trietune.io.directory import DamagedDirectory, FileContent, read_directory, write_directory
from trietune.io.disk_errors import SaveFailed, start_failed
from trietune.io.json_types import JsonMapping, JsonObject
from trietune.io.manifest import ManifestInfo
from trietune.model.adapter.adapter import adapter_files, set_adapter_tensors
from trietune.model.adapter.folder import WEIGHTS_FILE
from trietune.model.adapter.portable import CHAT_TEMPLATE
from trietune.model.adapter.push import push_folder
from trietune.model.adapter.tensors import bytes_to_tensors, tensors_to_content
from trietune.run import environment, resuming
from trietune.run.adapter_card import describe_adapter
from trietune.run.resuming import CARD_FILE, PROMPT_FILE, STATE_FILE
from trietune.tracking import events
from trietune.tracking.jsonl import LINE_FILES
from trietune.training.state import optimizer_tensors, restore_optimizer

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from trietune.evaluation.evaluate import Evaluation
    from trietune.run.prepared import Prepared
    from trietune.tracking.tracker import Tracker


class RunFiles:
    """The files of one run; hold the run's lock while it is in use."""

    def __init__(self, prepared: Prepared, tracker: Tracker) -> None:
        self.settings = prepared.settings
        self.prepared = prepared
        self.directory = prepared.plan.directory
        self.tracker = tracker
        self.environment = environment.describe(prepared)
        self.remote = open_remote(self.settings.storage_backend, self.settings.remote_path, self.directory.name)
        self.run_id = load_run_id(self.directory) or self._id_of_copies() or new_run_id()
        self.store = CheckpointStore(
            run_directory=self.directory,
            run_id=self.run_id,
            keep_last_n=self.settings.keep_last_n,
            keep_best_n=self.settings.keep_best_n,
            metric=self.settings.checkpoint_metric,
            mode=self.settings.checkpoint_metric_mode,
            measured_on=self._measured_on(),
            details=self.details(),
        )
        self.saved_step: int | None = None
        self._may_drop_optimizer = False
        self._uploader: Uploader | None = None

    def _id_of_copies(self) -> str | None:
        return self.remote.find_run_id() if self.remote is not None and self._reads_copies() else None

    def _reads_copies(self) -> bool:
        return bool(self.settings.load_from_storage and self.settings.resume_from_checkpoint)

    # Going on

    def finished(self, allowed_changes: frozenset[str]) -> tuple[int, str] | None:
        """Steps and place of the final adapter, if the run that is resumed has taken the steps of its plan."""
        return resuming.finished(self, allowed_changes)

    def find_checkpoint(self, allowed_changes: frozenset[str]) -> LoadedCheckpoint | None:
        """The checkpoint that the settings mean, read and verified; None for a fresh start."""
        self._may_drop_optimizer = OPTIMIZER_STATE in allowed_changes
        return resuming.find_checkpoint(self, allowed_changes)

    def is_comparable(self, resumed: LoadedCheckpoint) -> bool:
        """Whether the checkpoint was measured on what this run measures on."""
        return self.store.is_comparable(resumed.details)

    def start(self, resumed: LoadedCheckpoint | None) -> None:
        """Sign the folder, clean up after a kill, set aside what lies beyond the checkpoint, begin to copy."""
        self.sign()
        try:
            return self._start(resumed)
        except OSError as error:
            raise start_failed(error, Path(str(error.filename or self.directory))) from error

    def sign(self) -> None:
        """Write whose folder this is, unless that is written."""
        if not os.path.lexists(self.directory / ".run-id"):
            keep_run_id(self.directory, self.run_id)

    def _start(self, resumed: LoadedCheckpoint | None) -> None:
        self.store.clean_leftovers()
        step = -1 if resumed is None else resumed.step
        for name in LINE_FILES:
            abandoned = abandon_lines(self.directory / name, step)
            if abandoned.num_beyond and abandoned.path is not None:
                beyond = f"beyond step {step:,}" if resumed is not None else "from a start that saved nothing"
                self.tracker.info(f"{abandoned.num_beyond} lines of {name} {beyond} are now in {abandoned.path.name}")
        if resumed is not None:
            for path in self.store.set_aside_newer(resumed.step):
                self.tracker.info(f"what was saved after step {resumed.step:,} is now {path.name}")
            self.saved_step = resumed.step
        if self.remote is not None and self.settings.sync_to_storage:
            self._uploader = Uploader(self.store, self.remote, resumed_step=resumed.step if resumed else None)
            self._uploader.start()

    def move_to(self, directory: Path) -> None:
        """Save in another place from here on: the run's folder was moved there."""
        self.directory = self.store.run_directory = directory

    def restore(
        self, resumed: LoadedCheckpoint, peft_model: PeftModel, optimizer: torch.optim.Optimizer
    ) -> JsonMapping:
        """Put the checkpoint's weights (and optimizer) back and forget its bytes; returns `trainer_state.json`."""
        set_adapter_tensors(peft_model, resumed.take(WEIGHTS_FILE), where=str(resumed.path))
        if (reason := resuming.why_moments_start_from_zero(self, resumed)) is None:
            try:
                restore_optimizer(optimizer, bytes_to_tensors(resumed.take(OPTIMIZER_FILE)))
            except (ValueError, RuntimeError, TypeError) as error:  # its digest is right, and it is none of this run
                if not self._may_drop_optimizer:
                    raise messages.wrong_optimizer(resumed.path, first_line(error)) from error
                reason = f"{first_line(error)}, and `--allow-change {OPTIMIZER_STATE}`"
        if reason is None:
            self.tracker.info(
                f"resuming from step {resumed.step:,} with the optimizer's state, as if it had never stopped"
            )
        else:
            self.tracker.info(
                f"resuming from step {resumed.step:,}: weights, data order, schedule and step count continue; the "
                f"optimizer's moments start from zero ({reason})"
            )
        state = resuming.parse_state(resumed.take(STATE_FILE), resumed.path)
        resumed.contents.clear()
        return state

    # Saving

    def save(
        self,
        step: int,
        epoch: float,
        metrics: Mapping[str, float],
        peft_model: PeftModel,
        optimizer: torch.optim.Optimizer,
        *,
        further_state: JsonMapping,
        must_succeed: bool = False,
    ) -> float:
        """Write the checkpoint of `step` unless it is there; returns the seconds that it took.

        A save that the disk refuses is told, and training continues, unless `on_save_error: stop` or `must_succeed`.

        Args:
            metrics: measured on exactly these weights; empty if they were not measured.
            further_state: state of this session, into `trainer_state.json`.
        """
        if self.saved_step == step:
            return 0.0
        begin = time.monotonic()
        try:
            saved = self.store.save(
                step,
                self._checkpoint_files(step, epoch, peft_model, optimizer, further_state),
                metrics=metrics,
                details=self.details(),
                flush_first=[self.directory / name for name in LINE_FILES],
            )
        except SaveFailed as failure:
            if must_succeed or self.settings.on_save_error == "stop":
                raise
            self.tracker.warn(str(failure).removeprefix("error: "))
            return 0.0
        self.saved_step = step
        for warning in saved.warnings:
            self.tracker.warn(warning)
        seconds = time.monotonic() - begin
        self.tracker.emit(events.Saved("checkpoint", step, saved.path, dict(metrics), seconds))
        for path in saved.removed:
            self.tracker.emit(events.Removed(int(path.name.removeprefix("step-")), path))
        self.tell_uploads()
        if self._uploader is not None:
            self._uploader.saved()
        return seconds

    def better_than_last(self, step: int, metrics: Mapping[str, float]) -> tuple[int, bytes] | None:
        """Step and weights of the best checkpoint, if it was measured better than the weights of `step`."""
        name = self.settings.checkpoint_metric
        best, last = self.store.best(), metrics.get(name)
        value = best.metrics.get(name) if best is not None else None
        if best is None or value is None or last is None or best.step == step or not math.isfinite(last):
            return None
        if not (value < last if self.settings.checkpoint_metric_mode == "min" else value > last):
            return None
        try:
            weights = read_directory(best.path, without={OPTIMIZER_FILE})[1][WEIGHTS_FILE]
        except DamagedDirectory as damage:
            self.tracker.warn(f"{damage}: the final adapter is from the last step, not the best one")
            return None
        self.tracker.info(
            f"the final adapter is from step {best.step:,}: `{name}` was {value:.4g} there and {last:.4g} at the "
            "last step, on the same examples"
        )
        return best.step, weights

    def write_adapter(
        self,
        step: int,
        peft_model: PeftModel,
        before: Evaluation | None,
        after: Evaluation | None,
        encoder: Any,
        *,
        trained_steps: int,
        is_stopped_early: bool = False,
    ) -> Path:
        """Write `adapter/` whole, with its model card and prompt format; its weights are those of `step`."""
        begin = time.monotonic()
        target = self.directory / "adapter"
        metrics = dict(after.metrics) if after is not None else {}
        contents: dict[str, FileContent] = {
            **adapter_files(peft_model, self.prepared.base),
            PROMPT_FILE: self._prompt_format(),
            CARD_FILE: describe_adapter(self.prepared, self.directory.name, before, after, encoder).encode(),
        }
        if template := self.prepared.data.prompt_format.any_chat_template:
            contents[CHAT_TEMPLATE] = template.encode()
        details = {**self.details(), "trained_steps": trained_steps}
        if is_stopped_early:
            details["stopped_early"] = [self.settings.early_stopping_patience, self.settings.early_stopping_threshold]
        info = ManifestInfo(self.run_id, step, metrics, kind="adapter", details=details)
        write_directory(target, contents, info=info)
        self.tracker.emit(events.Saved("adapter", step, target, metrics, time.monotonic() - begin))
        return target

    # Copies

    def tell_uploads(self) -> None:
        """Pass on what the uploads have to say."""
        for sentence in self._uploader.news() if self._uploader is not None else ():
            self.tracker.warn(sentence)

    def finish_uploads(self, *, is_final: bool, must_leave: Callable[[], bool]) -> int:
        """Wait for what is left to copy, a bounded time; returns the exit code that it means."""
        if self._uploader is None:
            return EXIT_DONE
        result = self._uploader.close(final=is_final, must_leave=must_leave)
        self.tell_uploads()
        if result.is_complete:
            return EXIT_DONE
        missing = f": {', '.join(result.missing)}" if result.missing else ""
        self.tracker.warn(
            f"not everything was copied to {self.settings.remote_path} ({result.error}){missing}; all of it is on this "
            f"disk, and `trietune sync {self.directory}` uploads the rest",
        )
        return EXIT_UPLOAD_INCOMPLETE

    def push_to_hub(self, adapter: Path) -> int:
        """Upload the final adapter to the repository that the settings name; returns the exit code that it means."""
        repository = self.settings.push_to_hub
        if repository is None:
            return EXIT_DONE
        try:
            self.tracker.info(f"the adapter is at {push_folder(adapter, repository)}")
        except UserError as error:
            again = f"`trietune export {self.directory} --push {repository}` retries it"
            self.tracker.warn(f"{error.what}; the adapter is whole on this disk, and {again}")
            return EXIT_UPLOAD_INCOMPLETE
        return EXIT_DONE

    def details(self) -> JsonObject:
        """What a resume compares: the settings, and what surrounds them."""
        compared = environment.compared(self.environment)
        return {**self.settings.dump_public(), **compared, MEASURED_ON: self._measured_on()}

    def _measured_on(self) -> str:
        data, plan = self.prepared.data, self.prepared.plan
        return describe_measured_on(
            data.validation_fingerprint,
            num_examples=plan.num_validation,
            max_examples=plan.eval_max_examples,
            seed=self.settings.seed,
        )

    def _checkpoint_files(
        self,
        step: int,
        epoch: float,
        peft_model: PeftModel,
        optimizer: torch.optim.Optimizer,
        further_state: JsonMapping,
    ) -> dict[str, FileContent]:
        contents: dict[str, FileContent] = {
            **adapter_files(peft_model, self.prepared.base),
            PROMPT_FILE: self._prompt_format(),
        }
        state = {
            "step": step,
            "epoch": epoch,
            "has_optimizer": self.settings.save_optim,
            "num_warmup_steps": self.prepared.plan.num_warmup_steps,
            **further_state,
        }
        contents[STATE_FILE] = json.dumps(state, indent=2).encode()
        if self.settings.save_optim:
            contents[OPTIMIZER_FILE] = tensors_to_content(optimizer_tensors(optimizer))
        return contents

    def _prompt_format(self) -> bytes:
        return self.prepared.data.prompt_format.to_json().encode()
