"""A run from its settings to its adapter: the file where the stages meet.

    settings -> prepare (plan, data, base model) -> Session: evaluate, train, save, evaluate -> Run

The loop yields finished steps; what a step means (logged, validated, saved, the last one) is decided here.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trietune import environment
from trietune.checkpoints import directory as run_files
from trietune.checkpoints import files
from trietune.checkpoints.lock import RunLock
from trietune.checkpoints.manifest import ManifestInfo
from trietune.checkpoints.messages import SaveFailed
from trietune.checkpoints.resume import abandon_lines, check_differences, compare, load_or_create_run_id, table_lines
from trietune.checkpoints.store import CheckpointStore, LoadedCheckpoint
from trietune.errors import EXIT_DONE, EXIT_LOSS_NOT_FINITE, StopRequested, UserError
from trietune.prepare import Prepared, adapter_arguments, prepare, progress_of
from trietune.signals import StopSignals
from trietune.tracking import events
from trietune.tracking.consumers import open_tracker
from trietune.tracking.wandb import are_histograms_due, watched_kinds

if TYPE_CHECKING:
    from trietune.config.settings import Settings
    from trietune.evaluation.evaluate import Evaluation
    from trietune.tracking.dispatch import Tracker
    from trietune.training.loop import LossNotFiniteError, Step

SHOWN_EXAMPLES, SHOWN_PREDICTIONS = 3, 10
# `max_time` leaves this many steps' time, and this many seconds, to save in.
STEPS_LEFT_TO_SAVE, SECONDS_LEFT_TO_SAVE = 1.5, 2.0
STATE_FILE, OPTIMIZER_FILE, PROMPT_FILE = "trainer_state.json", "optimizer.safetensors", "prompt_format.json"
LINE_FILES = ("metrics.jsonl", "batches.jsonl")


@dataclass(frozen=True, slots=True)
class Run:
    """What a run left behind.

    Attributes:
        directory: the run's folder.
        status: `stopped` after a signal or `max_time`.
        step: optimizer steps taken in all.
        before, after: evaluation metrics of the whole validation set; empty where none was measured.
        adapter: folder of the final adapter; None if there is none.
        exit_code: that a command should end with.
    """

    directory: Path
    status: Literal["finished", "stopped"]
    step: int
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    adapter: Path | None = None
    exit_code: int = EXIT_DONE


def train(settings: Settings, *, tracker: Tracker | None = None, allowed_changes: frozenset[str] = frozenset()) -> Run:
    """Train the adapter that `settings` describe.

    Args:
        tracker: who hears of the run's events; by default its files, the console, and the tracker that the settings
            name.
        allowed_changes: keys that may differ from those of the checkpoint that is resumed.

    Raises:
        UserError: a mistake in settings or data, a loss that is not finite, a resume that was refused.
        StopRequested: a signal came before there was anything to save.
    """
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        hub = tracker or open_tracker(
            tracker=settings.tracker,
            use_wandb=settings.use_wandb,
            project=settings.wandb_project,
            run_name=settings.wandb_run_name,
            tags=settings.wandb_tags,
            model_to_wandb=settings.model_to_wandb,
        )
        stack.callback(hub.close)
        prepared = prepare(settings, hub, signals.check)
        files.make_folders(prepared.plan.directory)
        stack.enter_context(RunLock(prepared.plan.directory))
        return Session(prepared, hub, signals, allowed_changes).run()


class Session:
    """One run under way: the model, where its events go, and what has been measured so far."""

    def __init__(
        self, prepared: Prepared, hub: Tracker, signals: StopSignals, allowed_changes: frozenset[str] = frozenset()
    ) -> None:
        self.settings = prepared.settings
        self.plan = prepared.plan
        self.data = prepared.data
        self.base = prepared.base
        self.groups = prepared.groups
        self.tokenizer = prepared.tokenizer
        self.hub = hub
        self.signals = signals
        self.allowed_changes = allowed_changes
        self.began = time.monotonic()
        self.step = 0
        self.epoch = 0.0
        self.saved_step: int | None = None
        self.measured: dict[str, float] = {}
        self.measured_step: int | None = None
        self.run_id = load_or_create_run_id(self.plan.directory)
        self.store = CheckpointStore(
            run_directory=self.plan.directory,
            run_id=self.run_id,
            keep_last_n=self.settings.keep_last_n,
            keep_best_n=self.settings.keep_best_n,
            metric=self.settings.checkpoint_metric,
            mode=self.settings.checkpoint_metric_mode,
        )
        self.environment = environment.describe(prepared)
        self.meter = Meter()

    # The run, in the order in which things happen

    def run(self) -> Run:
        """From the first line to the last; the run's status is told to every consumer whatever happens."""
        resumed = self._find_checkpoint()
        if resumed is not None and (finished := self._already_finished(resumed)) is not None:
            return finished
        try:
            return self._run(resumed)
        except StopRequested as stop:
            return self._stopped(stop.signal_name, stop.exit_code)
        except BaseException:
            self._finish("failed", {}, ())
            raise

    def _run(self, resumed: LoadedCheckpoint | None) -> Run:
        self._start(resumed)
        self._build_model()
        if resumed is not None:
            self._restore(resumed)
        if self.settings.print_examples:
            self._show_examples()
        self._self_check()
        before = self._evaluate("before", max_examples=None) if resumed is None else None
        if self.plan.num_steps == 0:
            return self._finished(before, None, adapter=None)
        try:
            for step in self._steps():
                self._after_step(step)
        except _LOSS_NOT_FINITE() as error:
            self._raise_not_finite(error)
        self._take_best()
        after = self._evaluate("after", max_examples=None)
        return self._finished(before, after, adapter=self._write_adapter(before, after))

    def _start(self, resumed: LoadedCheckpoint | None) -> None:
        self.store.clean_leftovers()
        if resumed is not None:
            self.step = resumed.step
            for name in LINE_FILES:
                abandoned = abandon_lines(self.plan.directory / name, resumed.step)
                if abandoned.num_beyond:
                    self.hub.say(
                        f"{abandoned.num_beyond} lines of {name} beyond step {resumed.step:,} are now in "
                        f"{abandoned.path.name if abandoned.path else name}"
                    )
            self.store.set_aside_newer(resumed.step)
        self.hub.emit(
            events.RunStarted(
                name=self.plan.directory.name,
                directory=self.plan.directory,
                num_steps=self.plan.num_steps,
                first_step=self.step,
                config=self.settings.dump_public(),
                environment=self.environment,
                plan=self.plan.lines(),
            )
        )

    def _build_model(self) -> None:
        from trietune.data.tokenizer import make_encoder
        from trietune.model.adapter import add_adapter
        from trietune.model.causal_lm import TrieModel
        from trietune.model.load import load_network
        from trietune.model.lora_linear import fuse_adapters
        from trietune.training.optimizer import build_optimizer, learning_rate_schedule

        device = self.plan.device.torch_device
        self.hub.say(f"loading {self.base.name}")
        network = load_network(self.base, dtype=self.plan.dtype, device=device, report=self.hub.say)
        self.peft_model = add_adapter(network, base=self.base, **adapter_arguments(self.settings))
        fuse_adapters(network)
        if self.settings.gradient_checkpointing:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model = TrieModel(network, device=device, attention=self.plan.attention)
        self.encoder = make_encoder(self.tokenizer, self.data.prompt_format)
        self.optimizer = build_optimizer(
            self.settings.optim,
            [p for p in network.parameters() if p.requires_grad],
            learning_rate=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            device=device,
        )
        self.learning_rate = learning_rate_schedule(
            self.settings.lr_scheduler_type,
            peak=self.settings.learning_rate,
            num_steps=self.plan.num_steps,
            num_warmup_steps=self.plan.num_warmup_steps,
        )

    def _steps(self) -> Any:
        from trietune.training.loop import Schedules, train
        from trietune.training.sampler import Sampler

        self.sampler = self._sampler(Sampler)
        self.meter.start()
        return train(
            self.model,
            self.optimizer,
            self.sampler,
            Schedules(self.plan.num_steps, self.step, self.plan.batches_per_step, self.learning_rate),
            self._micro_batches,
            seed=self.settings.seed,
            max_grad_norm=self.settings.max_grad_norm,
            before_update=self._emit_histograms,
        )

    def _sampler(self, kind: Any) -> Any:
        return kind(
            self.plan.num_train, batch_size=self.plan.batch_size, seed=self.settings.seed, groups=self.groups
        )

    def _micro_batches(self, indices: Any) -> Any:
        from trietune.trie import make_micro_batches

        return make_micro_batches(
            self.data.train, indices, batching=self.plan.batching, max_nodes=self.plan.max_positions
        )

    def _after_step(self, step: Step) -> None:
        """Log, validate, save, and stop if it is time to."""
        self.step, self.epoch = step.number, step.epoch
        is_last = step.number == self.plan.num_steps
        is_logged = step.number % self.settings.steps_freq == 0 or is_last or step.number == 1
        self.hub.emit(
            events.StepFinished(
                step=step.number,
                epoch=step.epoch,
                metrics=self.meter.metrics(step, self.plan.device.used_memory_bytes()),
                example_ids=[self.data.train.ids[index] for index in step.sequence_indices],
                is_logged=is_logged,
            )
        )
        is_saved = self._is_save_due(step, is_last)
        if step.number % self.settings.val_steps_freq == 0 or is_saved or is_last:
            self._validate()
        if is_saved:
            self._save()
        if not is_last:
            self.signals.check()
            self._check_time()

    def _is_save_due(self, step: Step, is_last: bool) -> bool:
        match self.settings.save_strategy:
            case "step":
                return step.number % self.settings.steps_freq == 0
            case "epoch":
                ends_epoch = step.number % self.plan.steps_per_epoch == 0
                number = step.number // self.plan.steps_per_epoch
                return (ends_epoch and number % self.settings.epoch_freq == 0) or is_last
            case _:
                return False

    def _check_time(self) -> None:
        if self.settings.max_time is None:
            return
        left = self.settings.max_time - (time.monotonic() - self.began)
        if left < STEPS_LEFT_TO_SAVE * self.meter.slowest_step + SECONDS_LEFT_TO_SAVE:
            raise StopRequested("max_time", EXIT_DONE)

    # Evaluation

    def _validate(self) -> None:
        evaluation = self._evaluate("during", max_examples=self.plan.eval_max_examples)
        if evaluation is not None:
            self.measured, self.measured_step = dict(evaluation.metrics), self.step

    def _evaluate(
        self, when: Literal["before", "during", "after"], *, max_examples: int | None
    ) -> Evaluation | None:
        from trietune.evaluation.evaluate import evaluate

        if self.data.validation is None:
            return None
        begin = time.monotonic()
        evaluation = evaluate(
            self.model,
            self.data.validation,
            self.encoder,
            batching=self.plan.batching,
            max_nodes=self.plan.max_positions,
            batch_size=self.plan.eval_batch_size,
            max_examples=max_examples,
            seed=self.settings.seed,
            generate=when != "during" or "eval/loss" != self.settings.checkpoint_metric and self._metric_is_generated(),
            check_stop=self.signals.check,
            progress=progress_of(self.hub, "examples"),
        )
        self.meter.leave_out(time.monotonic() - begin)
        self.hub.emit(
            events.Evaluated(
                step=self.step,
                epoch=self.epoch,
                metrics=evaluation.metrics,
                num_examples=evaluation.num_examples,
                when=when,
                intervals=evaluation.intervals,
            )
        )
        if when != "during" and self.settings.print_examples and evaluation.predictions:
            self._show_predictions(evaluation, when)
        return evaluation

    def _metric_is_generated(self) -> bool:
        return self.data.task.kind == "answers" and self.settings.checkpoint_metric != "eval/perplexity"

    def _show_predictions(self, evaluation: Evaluation, when: Literal["before", "after"]) -> None:
        from trietune.evaluation.metrics import exact_match

        assert self.data.validation is not None
        shown = []
        for prediction in evaluation.predictions[:SHOWN_PREDICTIONS]:
            example = self.data.validation.examples[prediction.index]
            is_label = self.data.task.kind == "labels"
            is_right = (
                prediction.text in prediction.gold if is_label else exact_match(prediction.text, prediction.gold) == 1
            )
            expected = " / ".join(prediction.gold) if prediction.gold else "unanswerable"
            shown.append(events.Prediction(prediction.id, example.prompt, expected, prediction.text, bool(is_right)))
        self.hub.emit(events.Predicted(self.step, when, shown))

    def _show_examples(self) -> None:
        from trietune.data.preview import preview_examples

        previews = preview_examples(self.data.train, self.tokenizer, SHOWN_EXAMPLES)
        self.hub.emit(
            events.ExamplesShown(
                [events.MarkedExample(p.id, [(t.text, t.is_label) for t in p.tokens]) for p in previews]
            )
        )

    def _self_check(self) -> None:
        if not self.settings.self_check or self.plan.batching == "padded" or self.plan.num_steps == 0:
            return
        from trietune.model.self_check import check_against_rows
        from trietune.training.sampler import Sampler

        checked = check_against_rows(
            self.model,
            self.data.train,
            self._sampler(Sampler).batch(0, 0),
            batching=self.plan.batching,
            family=str(self.model.config.model_type),
        )
        if checked is not None:
            self.hub.say(
                f"self-check: {checked.num_examples} examples have a loss of {checked.loss:.5f} on a trie, "
                f"{checked.loss_of_rows:.5f} on plain rows"
            )

    # What is written

    def _save(self) -> None:
        """Write a checkpoint; a failed one is told, and training goes on unless `on_save_error` says otherwise."""
        if self.saved_step == self.step:
            return
        try:
            saved = self.store.save(
                self.step,
                self._checkpoint_files(),
                metrics=self.measured if self.measured_step == self.step else {},
                details=self._details(),
                flush_first=[self.plan.directory / name for name in LINE_FILES],
            )
        except SaveFailed as failure:
            if self.settings.on_save_error == "stop":
                raise
            self.hub.say(f"{failure}", is_warning=True)
            return
        self.saved_step = self.step
        self.meter.leave_out(saved.seconds)
        for warning in saved.warnings:
            self.hub.say(warning, is_warning=True)
        self.hub.emit(
            events.Saved("checkpoint", self.step, saved.path, dict(self.measured), saved.seconds)
        )
        for path in saved.removed:
            self.hub.emit(events.Removed(int(path.name.removeprefix("step-")), path))

    def _checkpoint_files(self) -> dict[str, bytes]:
        from trietune.model.adapter import adapter_files
        from trietune.model.raw_tensors import tensors_to_bytes
        from trietune.training.state import optimizer_tensors

        contents = {**adapter_files(self.peft_model, self.base), PROMPT_FILE: self._prompt_format()}
        state = {"step": self.step, "epoch": self.epoch, "has_optimizer": self.settings.save_optim}
        contents[STATE_FILE] = json.dumps(state, indent=2).encode()
        if self.settings.save_optim:
            contents[OPTIMIZER_FILE] = tensors_to_bytes(optimizer_tensors(self.optimizer))
        return contents

    def _prompt_format(self) -> bytes:
        return self.data.prompt_format.to_json().encode()

    def _details(self) -> dict[str, Any]:
        return {**self.settings.dump_public(), **environment.compared(self.environment)}

    def _take_best(self) -> None:
        """Go back to the best checkpoint's weights if they were measured better than the last ones."""
        best = self.store.best()
        last = self.measured.get(self.settings.checkpoint_metric) if self.measured_step == self.step else None
        value = best.metrics.get(self.settings.checkpoint_metric) if best is not None else None
        if best is None or value is None or last is None or best.step == self.step or not math.isfinite(last):
            return
        is_better = value < last if self.settings.checkpoint_metric_mode == "min" else value > last
        if not is_better:
            return
        from trietune.model.adapter import WEIGHTS_FILE, set_adapter_tensors

        _, contents = run_files.read_directory(best.path)
        set_adapter_tensors(self.peft_model, contents[WEIGHTS_FILE], where=str(best.path))
        self.hub.say(
            f"the final adapter is that of step {best.step:,}: `{self.settings.checkpoint_metric}` was {value:.4g} "
            f"there, {last:.4g} at the last step"
        )

    def _write_adapter(self, before: Evaluation | None, after: Evaluation | None) -> Path:
        from trietune.model.adapter import adapter_files

        begin = time.monotonic()
        target = self.plan.directory / "adapter"
        metrics = dict(after.metrics) if after is not None else {}
        contents = {
            **adapter_files(self.peft_model, self.base),
            PROMPT_FILE: self._prompt_format(),
            "README.md": self._card(before, after).encode(),
        }
        info = ManifestInfo(self.run_id, self.step, metrics, kind="adapter", details=self._details())
        run_files.write_directory(target, contents, info=info)
        self.hub.emit(events.Saved("adapter", self.step, target, metrics, time.monotonic() - begin))
        return target

    def _card(self, before: Evaluation | None, after: Evaluation | None) -> str:
        from trietune.model.card import CardFacts, Score, model_card

        scores = [
            Score(name, value, before.metrics.get(name) if before else None, after.num_examples)
            for name, value in (after.metrics.items() if after else ())
        ]
        prompt_format = self.data.prompt_format
        sequences = self.data.validation if self.data.validation is not None else self.data.train
        prompt_ids = self.encoder.encode_prompt(sequences.examples[0])
        without_bos = prompt_ids[1:] if prompt_ids[:1] == [prompt_format.bos_id] else prompt_ids
        return model_card(
            CardFacts(
                title=self.plan.directory.name,
                base=self.base,
                example_prompt=self.tokenizer.decode(without_bos),
                bos_id=prompt_format.bos_id,
                stop_ids=prompt_format.stop_ids,
                parses_special_tokens=prompt_format.parses_special_tokens,
                dataset=self.settings.dataset_id,
                num_train_examples=self.plan.num_train,
                scores=scores,
                settings={key: getattr(self.settings, key) for key in SHOWN_SETTINGS},
            )
        )

    def _emit_histograms(self, step: int) -> None:
        mode = self.settings.wandb_watch_mode
        if not are_histograms_due(step, mode=mode, every=self.settings.wandb_log_freq):
            return
        arrays = {}
        for name, parameter in self.peft_model.named_parameters():
            if not parameter.requires_grad:
                continue
            values = {"parameters": parameter.detach(), "gradients": parameter.grad}
            for kind in watched_kinds(mode):
                value = values[kind]
                if value is not None:
                    arrays[f"{kind}/{name}"] = value.float().flatten().cpu().numpy().copy()
        self.hub.emit(events.Histograms(step, arrays))

    # Resuming

    def _find_checkpoint(self) -> LoadedCheckpoint | None:
        choice = self.settings.resume_from_checkpoint
        if not choice:
            return None
        path = Path(self.settings.checkpoint_path) if self.settings.resume_option == "path" else None
        loaded = self.store.load(self.settings.resume_option, path, fresh_if_none=choice == "auto")
        if loaded is None:
            self.hub.say("no checkpoint yet: starting from the beginning")
            return None
        for note in loaded.notes:
            self.hub.say(note, is_warning=True)
        differences = compare(loaded.details, self._details(), self.allowed_changes)
        check_differences(differences, loaded.path)
        if differences:
            self.hub.say("since the checkpoint, this differs:", is_warning=True)
            for line in table_lines(differences):
                self.hub.say(line)
        return loaded

    def _already_finished(self, resumed: LoadedCheckpoint) -> Run | None:
        adapter = self.plan.directory / "adapter"
        if resumed.step < self.plan.num_steps or not adapter.is_dir():
            return None
        self.hub.say(f"{self.plan.directory.name} has finished: its adapter is in {adapter}; nothing was changed")
        return Run(self.plan.directory, "finished", resumed.step, adapter=adapter)

    def _restore(self, resumed: LoadedCheckpoint) -> None:
        from trietune.model.adapter import WEIGHTS_FILE, set_adapter_tensors
        from trietune.model.raw_tensors import bytes_to_tensors
        from trietune.training.state import restore_optimizer

        set_adapter_tensors(self.peft_model, resumed.contents[WEIGHTS_FILE], where=str(resumed.path))
        state = json.loads(resumed.contents[STATE_FILE])
        self.epoch = float(state["epoch"])
        self.saved_step = resumed.step
        if OPTIMIZER_FILE in resumed.contents:
            restore_optimizer(self.optimizer, bytes_to_tensors(resumed.contents[OPTIMIZER_FILE]))
            self.hub.say(f"going on from step {resumed.step:,} with the optimizer's state: as if never stopped")
        else:
            self.hub.say(
                f"going on from step {resumed.step:,}: data order, schedule and step count go on; the optimizer's "
                "moments start anew (`save_optim: True` keeps them)"
            )

    # Endings

    def _finished(self, before: Evaluation | None, after: Evaluation | None, *, adapter: Path | None) -> Run:
        summary = {f"before/{k}": v for k, v in (before.metrics.items() if before else ())}
        summary.update(after.metrics if after else {})
        run = self.plan.directory
        commands = [f"trietune report {run}"]
        if adapter is not None:
            commands = [f"trietune predict {run}", f"trietune evaluate {run}", *commands]
        self._finish("finished", summary, commands)
        return Run(
            run,
            "finished",
            self.step,
            before=dict(before.metrics) if before else {},
            after=dict(after.metrics) if after else {},
            adapter=adapter,
        )

    def _stopped(self, reason: str, exit_code: int) -> Run:
        """Save what has been learnt; no final adapter is written."""
        commands: list[str] = []
        if self.step > 0:
            self._save()
            commands = ["the same command with `--resume` goes on from here"]
        self.hub.say(f"stopped by {reason} after step {self.step:,}")
        self._finish("stopped", {}, commands)
        return Run(self.plan.directory, "stopped", self.step, exit_code=exit_code)

    def _finish(
        self, status: Literal["finished", "stopped", "failed"], summary: Mapping[str, Any], commands: Any
    ) -> None:
        self.hub.emit(
            events.RunFinished(status, self.step, time.monotonic() - self.began, summary, tuple(commands))
        )

    def _raise_not_finite(self, error: LossNotFiniteError) -> None:
        ids = [self.data.train.ids[index] for index in error.sequence_indices]
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        what = "loss" if not math.isfinite(error.loss) else "gradient"
        raise UserError(
            f"the {what} of step {error.number} is not finite (loss {error.loss:.4g}, gradient norm "
            f"{error.grad_norm:.4g})",
            where=f"examples of that step: {shown}",
            next_step="lower `learning_rate`, set `max_grad_norm: 1.0`, or use `dtype: float32`; checkpoints of "
            "earlier steps are whole",
            exit_code=EXIT_LOSS_NOT_FINITE,
        ) from error


SHOWN_SETTINGS = (
    "max_length", "learning_rate", "batch_size", "num_epochs", "lora_r", "lora_alpha", "lora_target_modules", "dtype",
    "seed",
)  # fmt: skip


def _LOSS_NOT_FINITE() -> type[LossNotFiniteError]:  # noqa: N802  (torch must not load with this module)
    from trietune.training.loop import LossNotFiniteError

    return LossNotFiniteError


class Meter:
    """Rates since the last step, without the time that evaluation and saving took."""

    def __init__(self) -> None:
        self._last = 0.0
        self._left_out = 0.0
        self.slowest_step = 0.0

    def start(self) -> None:
        self._last = time.monotonic()

    def leave_out(self, seconds: float) -> None:
        """Time that is not training's."""
        self._left_out += seconds

    def metrics(self, step: Step, memory_bytes: int) -> dict[str, float | int | None]:
        """The metrics of one step."""
        now = time.monotonic()
        seconds = max(now - self._last - self._left_out, 1e-9)
        self._last, self._left_out = now, 0.0
        self.slowest_step = max(self.slowest_step, seconds)
        return {
            "train/loss": step.loss,
            "learning_rate": step.learning_rate,
            "grad_norm": step.grad_norm,
            "examples_per_second": len(step.sequence_indices) / seconds,
            "tokens_per_second": step.num_positions / seconds,
            "sharing_factor": step.num_tokens / max(step.num_positions, 1),
            "num_labels": step.num_labels,
            "num_micro_batches": step.num_micro_batches,
            "memory_bytes": memory_bytes,
        }
