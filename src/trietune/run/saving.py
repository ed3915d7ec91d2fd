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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trietune.checkpoints import messages
from trietune.checkpoints.measured import MEASURED_ON, describe_measured_on
from trietune.checkpoints.messages import OPTIMIZER_FILE, OPTIMIZER_STATE
from trietune.checkpoints.remote.open import open_remote
from trietune.checkpoints.resume import (
    Difference,
    abandon_lines,
    check_differences,
    compare,
    compare_warmup,
    keep_run_id,
    load_run_id,
    new_run_id,
    table_lines,
)
from trietune.checkpoints.store import CheckpointStore, LoadedCheckpoint
from trietune.errors import EXIT_DONE, EXIT_UPLOAD_INCOMPLETE, UserError
from trietune.io import strict_json
from trietune.io.causes import first_line
from trietune.io.directory import DamagedDirectory, FileContent, read_directory, verify_directory, write_directory
from trietune.io.disk_errors import SaveFailed, start_failed
from trietune.io.manifest import ManifestInfo
from trietune.run import environment
from trietune.run.plan import num_steps_of
from trietune.tracking import events
from trietune.tracking.jsonl import LINE_FILES

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from trietune.checkpoints.remote.uploads import Uploader
    from trietune.evaluation.evaluate import Evaluation
    from trietune.run.prepare import Prepared
    from trietune.tracking.tracker import Tracker

STATE_FILE, PROMPT_FILE, CARD_FILE = "trainer_state.json", "prompt_format.json", "README.md"
# A longer or shorter plan is told apart by its steps; the key is the adapter's own.
STEPS_KEYS = (
    "trained_steps", "num_epochs", "max_steps", "stopped_early", "early_stopping_patience", "early_stopping_threshold",
)  # fmt: skip
# One formula in three kernels, whose state is the same.
SAME_STATE = {"adamw", "adamw_torch", "adamw_torch_fused"}
# Shown in the model card.
CARD_SETTINGS = (
    "max_length", "learning_rate", "batch_size", "num_epochs", "lora_r", "lora_alpha", "lora_target_modules", "dtype",
    "seed",
)  # fmt: skip


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
        """Steps and place of the final adapter, if the run that is resumed has taken the steps of its plan.

        Asked before any checkpoint: those may be gone, or were never written. An edited model card changes nothing.

        Raises:
            UserError: it is the adapter of another training.
        """
        info, place = self._adapter_info()
        trained = _trained_steps(info)
        if info is None or trained is None or info.run_id != self.run_id:
            return None
        if trained < self.prepared.plan.num_steps and not self._was_stopped_early(info):
            return None
        before, now = (
            {key: value for key, value in details.items() if key not in STEPS_KEYS}
            for details in (info.details, self.details())
        )
        check_differences(compare(before, now, allowed_changes), Path(place))
        return trained, place

    def _was_stopped_early(self, info: ManifestInfo) -> bool:
        """Whether patience ended that run, and would end it again."""
        asked = (self.settings.early_stopping_patience, self.settings.early_stopping_threshold)
        return info.details.get("stopped_early") == list(asked)

    def _adapter_info(self) -> tuple[ManifestInfo | None, str]:
        """What the final adapter says of itself, here or in the storage, and where it lies; None if none is whole."""
        adapter = self.directory / "adapter"
        if not self.settings.resume_from_checkpoint:
            return None, str(adapter)
        if os.path.lexists(adapter) or self.remote is None or not self.settings.load_from_storage:
            try:
                return verify_directory(adapter, without={CARD_FILE}).manifest.info, str(adapter)
            except DamagedDirectory:
                return None, str(adapter)
        found = self.remote.adapter_manifest()
        return (found.info if found is not None else None), f"{self.remote.location}/adapter"

    def _check_no_adapter(self) -> None:
        """Refuse to start from the beginning where an adapter would be replaced that no checkpoint leads up to."""
        info, place = self._adapter_info()
        if info is None:
            if not os.path.lexists(place):
                return
            reason = "it is not whole, as `trietune verify` shows"
        elif info.run_id != self.run_id:
            reason = f"it belongs to another run ({info.run_id[:12]})"
        else:
            reason = f"it was trained for {_trained_steps(info)} steps, the plan has {self.prepared.plan.num_steps:,}"
        raise messages.adapter_without_checkpoint(place, reason)

    def find_checkpoint(self, allowed_changes: frozenset[str]) -> LoadedCheckpoint | None:
        """The checkpoint that the settings mean, read and verified; None for a fresh start.

        Raises:
            UserError: none that can be believed, or one of another training.
        """
        choice = self.settings.resume_from_checkpoint
        if not choice:
            return None
        path = Path(self.settings.checkpoint_path) if self.settings.resume_option == "path" else None
        if self.settings.load_from_storage and self.remote is not None:
            from trietune.checkpoints.remote.uploads import fetch

            self._sign()
            for note in fetch(self.store, self.remote, self.settings.resume_option, path):
                self.tracker.info(note)
        if not self.store.has_traces():
            self._check_no_adapter()
        self._may_drop_optimizer = OPTIMIZER_STATE in allowed_changes
        expendable = {OPTIMIZER_FILE} if OPTIMIZER_STATE in allowed_changes else set()
        loaded = self.store.load(
            self.settings.resume_option, path, fresh_if_none=choice == "auto", expendable=expendable
        )
        if loaded is None:
            self.tracker.info("no checkpoint yet: starting from the beginning")
            return None
        for note in loaded.notes:
            self.tracker.warn(note)
        # A key that is newer than the checkpoint was, in effect, at its default.
        saved = {**type(self.settings)().dump_public(), **loaded.details}
        differences = [
            *compare(saved, self.details(), allowed_changes),
            *self._schedule_differences(loaded, allowed_changes),
        ]
        check_differences(differences, loaded.path)
        if differences:
            self.tracker.warn("settings have changed since the checkpoint:")
            for line in table_lines(differences):
                self.tracker.info(f"  {line}")
        return loaded

    def _schedule_differences(self, loaded: LoadedCheckpoint, allowed_changes: frozenset[str]) -> list[Difference]:
        """Steps of warm-up are not a setting: they follow from others and from the number of examples."""
        from trietune.model.adapter.folder import WEIGHTS_FILE

        if STATE_FILE not in loaded.contents or WEIGHTS_FILE not in loaded.contents:
            lacking = STATE_FILE if STATE_FILE not in loaded.contents else WEIGHTS_FILE
            raise messages.wrong_contents(loaded.path, lacking, "is not among the files of its manifest")
        state = _parse_state(loaded.contents[STATE_FILE], loaded.path)
        before = state.get("num_warmup_steps")
        if before is None:
            before = self._warmup_before(loaded, state)
        return compare_warmup(before, self.prepared.plan.num_warmup_steps, loaded.step, allowed_changes)

    def _warmup_before(self, loaded: LoadedCheckpoint, state: Mapping[str, Any]) -> int | None:
        """Of a checkpoint that does not say it, worked out from its settings as they were planned."""
        names = ("num_epochs", "max_steps", "warmup_ratio", "warmup_steps", "batch_size", "gradient_accumulation_steps")
        if not all(name in loaded.details for name in names):
            return None
        then = self.settings.model_copy(update={name: loaded.details[name] for name in names})
        return then.num_warmup_steps(num_steps_of(then, self.prepared.plan.num_train)[1])

    def is_comparable(self, resumed: LoadedCheckpoint) -> bool:
        """Whether the checkpoint was measured on what this run measures on."""
        return self.store.is_comparable(resumed.details)

    def start(self, resumed: LoadedCheckpoint | None) -> None:
        """Sign the folder, clean up after a kill, set aside what lies beyond the checkpoint, begin to copy."""
        self._sign()
        try:
            return self._start(resumed)
        except OSError as error:
            raise start_failed(error, Path(str(error.filename or self.directory))) from error

    def _sign(self) -> None:
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
            from trietune.checkpoints.remote.uploads import Uploader

            self._uploader = Uploader(self.store, self.remote, resumed_step=resumed.step if resumed else None)
            self._uploader.start()

    def move_to(self, directory: Path) -> None:
        """Save in another place from here on: the run's folder was moved there."""
        self.directory = self.store.run_directory = directory

    def restore(
        self, resumed: LoadedCheckpoint, peft_model: PeftModel, optimizer: torch.optim.Optimizer
    ) -> Mapping[str, Any]:
        """Put the checkpoint's weights (and optimizer) back and forget its bytes; returns `trainer_state.json`."""
        from trietune.model.adapter.adapter import set_adapter_tensors
        from trietune.model.adapter.folder import WEIGHTS_FILE
        from trietune.model.adapter.tensors import bytes_to_tensors
        from trietune.training.state import restore_optimizer

        set_adapter_tensors(peft_model, resumed.take(WEIGHTS_FILE), where=str(resumed.path))
        if (reason := self._why_moments_start_from_zero(resumed)) is None:
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
        state = _parse_state(resumed.take(STATE_FILE), resumed.path)
        resumed.contents.clear()
        return state

    def _why_moments_start_from_zero(self, resumed: LoadedCheckpoint) -> str | None:
        if OPTIMIZER_FILE in resumed.left_out:
            return "their file is damaged"
        if OPTIMIZER_FILE not in resumed.contents:
            return "`save_optim: True` keeps them"
        kinds = {resumed.details.get("optim"), self.settings.optim}
        return None if len(kinds) == 1 or kinds <= SAME_STATE else "another `optim` keeps others"

    # Saving

    def save(
        self,
        step: int,
        epoch: float,
        metrics: Mapping[str, float],
        peft_model: PeftModel,
        optimizer: torch.optim.Optimizer,
        *,
        further_state: Mapping[str, Any],
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
        from trietune.model.adapter.folder import WEIGHTS_FILE

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
        from trietune.model.adapter.adapter import adapter_files
        from trietune.model.adapter.portable import CHAT_TEMPLATE

        begin = time.monotonic()
        target = self.directory / "adapter"
        metrics = dict(after.metrics) if after is not None else {}
        contents: dict[str, FileContent] = {
            **adapter_files(peft_model, self.prepared.base),
            PROMPT_FILE: self._prompt_format(),
            CARD_FILE: self._card(before, after, encoder).encode(),
        }
        if template := self.prepared.data.prompt_format.chat_template:
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
        from trietune.model.adapter.push import push_folder

        try:
            self.tracker.info(f"the adapter is at {push_folder(adapter, repository)}")
        except UserError as error:
            again = f"`trietune export {self.directory} --push {repository}` retries it"
            self.tracker.warn(f"{error.what}; the adapter is whole on this disk, and {again}")
            return EXIT_UPLOAD_INCOMPLETE
        return EXIT_DONE

    def details(self) -> dict[str, Any]:
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
        further_state: Mapping[str, Any],
    ) -> dict[str, FileContent]:
        from trietune.model.adapter.adapter import adapter_files
        from trietune.model.adapter.tensors import tensors_to_content
        from trietune.training.state import optimizer_tensors

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

    def _card(self, before: Evaluation | None, after: Evaluation | None, encoder: Any) -> str:
        from trietune.data.columns import WrongRow
        from trietune.data.shapes import without_own_text
        from trietune.model.adapter.card import CardFacts, Score, model_card

        scores = []
        if after is not None:
            earlier = before.metrics if before is not None else {}
            scores = [Score(n, value, earlier.get(n), after.num_examples) for n, value in after.metrics.items()]
        data, plan = self.prepared.data, self.prepared.plan
        prompt_format = data.prompt_format
        sequences = data.validation if data.validation is not None else data.train
        shown = example = sequences.examples[0]
        if not self.settings.card_example:
            shown = without_own_text(prompt_format, example)
        try:
            prompt_ids = encoder.encode_prompt(shown)
        except WrongRow:  # a chat template that looks into the texts refuses placeholders
            prompt_ids = encoder.encode_prompt(replace(shown, prompt="{prompt}", messages=()))
        without_bos = prompt_ids[1:] if prompt_ids[:1] == [prompt_format.bos_id] else prompt_ids
        return model_card(
            CardFacts(
                title=self.directory.name,
                base=self.prepared.base,
                example_prompt=self.prepared.tokenizer.decode(without_bos),
                is_shape=not self.settings.card_example,
                bos_id=prompt_format.bos_id,
                stop_ids=prompt_format.stop_ids,
                parses_special_tokens=prompt_format.parses_special_tokens,
                dataset=data.source_name,
                trained_on=data.trained_on,
                measured_on=data.measured_on,
                num_train_examples=plan.num_train,
                scores=scores,
                settings={
                    **({} if self.settings.objective == "sft" else {"objective": self.settings.objective}),
                    **{key: getattr(self.settings, key) for key in CARD_SETTINGS},
                },
            )
        )


def _trained_steps(info: ManifestInfo | None) -> int | None:
    trained = info.details.get("trained_steps") if info is not None else None
    return trained if isinstance(trained, int) else None


def _parse_state(data: bytes, checkpoint: Path) -> Mapping[str, Any]:
    """`trainer_state.json`, its values of the kinds that are written. Raises `UserError` for anything else."""

    def is_count(value: object) -> bool:
        return type(value) is int and value >= 0

    kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "epoch": ("a number", lambda value: type(value) in (int, float) and value >= 0),
        "max_positions": ("a count", lambda value: is_count(value) and value > 0),
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
