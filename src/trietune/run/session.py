"""A run from its settings to its adapter: the file where the stages meet.

    settings -> prepare (plan, data, base model) -> Session: evaluate, train, save, evaluate -> Run

The loop yields finished steps; what a step means (logged, validated, saved, the last one) is decided here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trietune.checkpoints.lock import RunLock
from trietune.checkpoints.store import LoadedCheckpoint
from trietune.errors import EXIT_DONE, EXIT_LOSS_NOT_FINITE, StopRequested, UserError
from trietune.io.files import make_folders
from trietune.ranks.opening import open_ranks
from trietune.ranks.ranks import ALONE, Ranks
from trietune.run.malloc import KeptMemory, give_back_freed_memory, hand_back_freed_memory, keep_freed_memory
from trietune.run.prepare import Prepared, adapter_arguments, prepare_together, progress_of
from trietune.run.shared_keeper import open_keeper
from trietune.run.signals import StopSignals
from trietune.run.throughput import Meter
from trietune.tracking import events
from trietune.tracking.open import open_tracker
from trietune.tracking.tracker import Tracker
from trietune.tracking.wandb.wandb import are_histograms_due, watched_kinds

if TYPE_CHECKING:
    from trietune.config.settings import Settings
    from trietune.evaluation.evaluate import Evaluation
    from trietune.training.loop import MicroBatchTooLargeError, Step
    from trietune.training.loss_scale import LossScale
    from trietune.training.readings import LossNotFiniteError

SHOWN_EXAMPLES, SHOWN_PREDICTIONS = 3, 10
# `max_time` leaves this many steps' time, and this many seconds, to save in.
STEPS_LEFT_TO_SAVE, SECONDS_LEFT_TO_SAVE = 1.5, 2.0
# Launchers kill 10 to 30 seconds after a signal; copies that are not through by then are left to `trietune sync`.
SECONDS_TO_COPY_AFTER_SIGNAL = 6.0


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
    """Train the adapter that `settings` describe; of several processes that a launcher started, each its part.

    Args:
        tracker: who hears of the run's events; by default its files, the console, and the tracker that the settings
            name.
        allowed_changes: keys that may differ from those of the checkpoint that is resumed.

    Raises:
        UserError: a mistake in settings or data, a loss that is not finite, a resume that was refused, or a process
            that was lost.
        StopRequested: a signal came before there was anything to save.
    """
    with ExitStack() as stack:
        if settings.parallelism_strategy == "fsdp":
            hand_back_freed_memory()
        elif keep_freed_memory():
            stack.callback(give_back_freed_memory)
        signals = stack.enter_context(StopSignals())
        ranks = open_ranks(may_use_cuda=settings.device in ("auto", "cuda"))
        stack.callback(ranks.close)
        hub = ranks.first_of(lambda: tracker or _open_tracker(settings), Tracker)
        stack.callback(hub.close)
        prepared = prepare_together(settings, hub, signals.check, ranks)
        ranks.once(lambda: _take_folder(prepared.plan.directory, stack))
        return Session(prepared, hub, signals, allowed_changes, ranks).run()


def _open_tracker(settings: Settings) -> Tracker:
    return open_tracker(
        tracker=settings.tracker,
        use_wandb=settings.use_wandb,
        project=settings.wandb_project,
        run_name=settings.wandb_run_name,
        tags=settings.wandb_tags,
        model_to_wandb=settings.model_to_wandb,
    )


def _take_folder(directory: Path, stack: ExitStack) -> None:
    """Make the run's folder, and hold its lock until `stack` is closed."""
    make_folders(directory)
    stack.enter_context(RunLock(directory))


class Session:
    """One run under way: the model, where its events go, and what has been measured so far."""

    def __init__(
        self,
        prepared: Prepared,
        hub: Tracker,
        signals: StopSignals,
        allowed_changes: frozenset[str] = frozenset(),
        ranks: Ranks = ALONE,
    ) -> None:
        from trietune.device.cpu import resident_bytes

        self.settings = prepared.settings
        self.plan = prepared.plan
        self.data = prepared.data
        self.base = prepared.base
        self.groups = prepared.groups
        self.tokenizer = prepared.tokenizer
        self.hub = hub
        self.signals = signals
        self.ranks = ranks
        self.is_sharded = self.settings.parallelism_strategy == "fsdp"
        if self.is_sharded:
            ranks.has_equal_passes = True
        self.allowed_changes = allowed_changes
        self.began = time.monotonic()
        self.step = 0
        self.epoch = 0.0
        self.measured: dict[str, float] = {}
        self.measured_step: int | None = None
        self.max_positions = self.plan.max_positions
        self.keeper = open_keeper(prepared, hub, ranks)
        self.meter = Meter()
        self.kept_memory = KeptMemory(resident_bytes)
        self.loss_scale: LossScale | None = None

    # The run, in the order in which things happen

    def run(self) -> Run:
        """From the first line to the last; the run's status is told to every consumer whatever happens."""
        resumed = self.keeper.find_checkpoint(self.allowed_changes)
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
        from trietune.training.readings import LossNotFiniteError

        self._start(resumed)
        self.ranks.together(self._build_model)
        if resumed is not None:
            self._restore(resumed)
            self._measure_again(resumed)
        if self.settings.print_examples:
            self._show_examples()
        self.ranks.together(self._self_check)
        before = self._evaluate("before", max_examples=None) if resumed is None else None
        if self.plan.num_steps == 0:
            return self._finished(before, None, adapter=None)
        try:
            with closing(self._steps()) as steps:
                for step in steps:
                    self._after_step(step)
        except LossNotFiniteError as error:
            # Every rank knows; one says it.
            not_finite = error
            self.ranks.once(lambda: self._raise_not_finite(not_finite))
        step_of_adapter = self._take_best()
        after = self._evaluate("after", max_examples=None)
        adapter = self.keeper.write_adapter(
            step_of_adapter, self.peft_model, before, after, self.encoder, trained_steps=self.step
        )
        return self._finished(before, after, adapter=adapter)

    def _restore(self, resumed: LoadedCheckpoint) -> None:
        from trietune.training.loss_scale import LossScale

        state = self.keeper.restore(resumed, self.peft_model, self.optimizer)
        self.epoch = float(state["epoch"])
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale = LossScale(self.plan.device.torch_device, state["loss_scale"])
        self._take_over_memory(state)

    def _take_over_memory(self, state: Mapping[str, Any]) -> None:
        """Cut batches and pack weights as before, whatever memory is free now, so that the numbers are the same."""
        from trietune.model.fast.frozen_weight import pack_frozen_weights

        before, packed = state.get("max_positions"), state.get("packed_bytes")
        if self.settings.max_tokens_per_micro_batch == "auto" and before is not None:
            if self.max_positions < before:
                self.hub.say(
                    f"less memory is free than before: micro-batches of at most {self.max_positions:,} tokens instead "
                    f"of {before:,}; a batch that is cut in another way has the same gradients up to rounding"
                )
            self.max_positions = min(self.max_positions, before)
        if self.settings.pack_weights == "auto" and packed is not None and packed != self.model.packed_bytes:
            most = min(packed, self.model.packed_bytes)
            self.model.packed_bytes = pack_frozen_weights(self.model.network, most_bytes=most)
            if self.model.packed_bytes != packed:
                self.hub.say(
                    "less memory is free than before, so fewer weights are packed: the same numbers up to rounding, "
                    "not the same bits"
                )

    def _measure_again(self, resumed: LoadedCheckpoint) -> None:
        """Take the validation that a signal cut short, so that the checkpoint of a due step is ranked after all."""
        if resumed.metrics:
            self.measured, self.measured_step = _finite(resumed.metrics), resumed.step
        elif resumed.step % self.settings.val_steps_freq == 0 and self.data.validation is not None:
            self._validate()
            self.keeper.saved_step = None
            self._save()

    def _start(self, resumed: LoadedCheckpoint | None) -> None:
        self.keeper.start(resumed)
        if resumed is not None:
            self.step = resumed.step
        self.hub.emit(
            events.RunStarted(
                name=self.plan.directory.name,
                directory=self.plan.directory,
                num_steps=self.plan.num_steps,
                first_step=self.step,
                config=self.settings.dump_public(),
                environment=self.keeper.environment,
                plan=self.plan.lines(),
            )
        )

    def _build_model(self) -> None:
        from trietune.data.encoder import make_encoder
        from trietune.model.adapter.adapter import add_adapter
        from trietune.model.assemble import assemble
        from trietune.model.base.load import load_network
        from trietune.training.loss_scale import LossScale
        from trietune.training.optimizer import build_optimizer, learning_rate_schedule
        from trietune.training.sampler import Sampler

        device = self.plan.device
        device.watch_memory()
        self.hub.say(f"loading {self.base.name}")
        if self.is_sharded:
            from trietune.model.base.load_sharded import gathering, load_sharded

            network = load_sharded(self.base, dtype=self.plan.dtype, device=device.loading_device, report=self.hub.say)
        else:
            network = load_network(
                self.base,
                dtype=self.plan.dtype,
                device=device.loading_device,
                load_in_4bit=self.plan.load_in_4bit,
                report=self.hub.say,
            )
        self.peft_model = add_adapter(network, base=self.base, **adapter_arguments(self.settings))
        self.model = assemble(
            network,
            device,
            attention=self.plan.attention,
            fused_layers=self.settings.fused_layers,
            pack_weights=False if self.is_sharded else self.settings.pack_weights,
            shapes=self.plan.static.shapes if self.plan.static else None,
            gradient_checkpointing=self.settings.gradient_checkpointing,
            whole=gathering(network) if self.is_sharded else nullcontext,
        )
        self.encoder = make_encoder(self.tokenizer, self.data.prompt_format)
        self.optimizer = build_optimizer(
            self.settings.optim,
            [p for p in network.parameters() if p.requires_grad],
            learning_rate=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            device=device,
        )
        self.loss_scale = LossScale(device.torch_device) if self.plan.has_loss_scale else None
        self.sampler = Sampler(
            self.plan.num_train, batch_size=self.plan.batch_size, seed=self.settings.seed, groups=self.groups
        )
        self.learning_rate = learning_rate_schedule(
            self.settings.lr_scheduler_type,
            peak=self.settings.learning_rate,
            num_steps=self.plan.num_steps,
            num_warmup_steps=self.plan.num_warmup_steps,
        )

    def _steps(self) -> Any:
        from trietune.training.loop import Schedules, train

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
            cut_smaller=self._cut_smaller,
            device=self.plan.device,
            loss_scale=self.loss_scale,
            is_read=self._is_read,
            ranks=self.ranks,
            deal=None if self.ranks is ALONE else self._deal,
            wants_stop=self._wants_stop,
        )

    def _deal(self, indices: Any) -> Any:
        from trietune.trie.dealing import deal_step

        return deal_step(
            self.data.train,
            indices,
            self.ranks.count,
            batching=self.plan.batching,
            label_cost=self.plan.label_cost,
        )

    def _micro_batches(self, indices: Any) -> Any:
        from trietune.trie import make_micro_batches

        return self.model.arrange(
            make_micro_batches(self.data.train, indices, batching=self.plan.batching, max_nodes=self.max_positions)
        )

    def _is_read(self, number: int) -> bool:
        """Whether anybody asks for the loss of step `number`, or acts on it."""
        return (
            self._is_logged(number)
            or number % self.settings.val_steps_freq == 0
            or self._is_save_due(number, number == self.plan.num_steps)
        )

    def _is_logged(self, number: int) -> bool:
        return number % self.settings.steps_freq == 0 or number in (1, self.plan.num_steps)

    def _cut_smaller(self, error: MicroBatchTooLargeError) -> None:
        """Memory ran out: half as much at once from here on, in validations too."""
        self._write_memory_snapshot()
        if self.is_sharded:
            raise UserError(
                f"memory ran out at a micro-batch of {error.num_positions:,} tokens",
                where=f"step {self.step + 1}, on {self.plan.device.name}; checkpoints of earlier steps are whole",
                next_step=f"`--resume --set max_tokens_per_micro_batch={max(error.num_positions // 2, error.longest)}`",
            ) from error
        if error.num_positions <= error.longest:
            self.ranks.once(lambda: self._raise_too_long(error))
        self.max_positions = max(error.num_positions // 2, error.longest)
        redrawn = "; dropout draws other masks" if self.settings.lora_dropout else ""
        self.hub.say(
            f"memory ran out at a micro-batch of {error.num_positions:,} tokens: at most {self.max_positions:,} from "
            f"here on, and step {self.step + 1:,} begins again{redrawn}",
            is_warning=True,
        )

    def _raise_too_long(self, error: MicroBatchTooLargeError) -> None:
        raise UserError(
            f"not enough memory for one example of {error.longest:,} tokens",
            where=f"step {self.step + 1}, on {self.plan.device.name}; checkpoints of earlier steps are whole",
            next_step="`--set gradient_checkpointing=True`"
            if not self.settings.gradient_checkpointing
            else f"leave longer examples out: `--set max_length={max(error.longest // 2, 1)}`, or take a smaller "
            "base model",
        ) from error

    def _write_memory_snapshot(self) -> None:
        """What took memory until it ran out, the first time."""
        path = self.plan.directory / "memory_snapshot.pickle"

        def write() -> None:
            try:
                if not path.exists() and self.plan.device.write_memory_snapshot(path):
                    self.hub.say(f"{path} shows what took memory; open it at https://pytorch.org/memory_viz")
            except OSError as error:
                self.hub.say(f"no memory snapshot: {error}", is_warning=True)

        self.ranks.on_first(write)

    def _after_step(self, step: Step) -> None:
        """Log, validate, save, and stop if it is time to."""
        self.step, self.epoch = step.number, step.epoch
        self.kept_memory.after_step()
        is_last, device = step.number == self.plan.num_steps, self.plan.device
        self.hub.emit(
            events.StepFinished(
                step=step.number,
                epoch=step.epoch,
                metrics=self.meter.metrics(
                    step, device.used_memory_bytes(), device.compilations(), waiting_share=self.ranks.waiting_share
                ),
                example_ids=[self.data.train.ids[index] for index in step.sequence_indices],
                is_logged=self._is_logged(step.number),
            )
        )
        is_saved = self._is_save_due(step.number, is_last)
        if step.number % self.settings.val_steps_freq == 0 or is_saved or is_last:
            self._validate()
        if is_saved:
            self._save()
        self.keeper.tell_uploads()
        if not is_last:
            self.ranks.stop_together(self._check_stop, step.num_stopping)

    def _check_stop(self) -> None:
        """Raise `StopRequested` after a signal, or when time is up."""
        self.signals.check()
        self._check_time()

    def _wants_stop(self) -> bool:
        """Whether this process wants to stop after the step under way; of one process, it is asked afterwards."""
        if self.ranks is ALONE:
            return False
        try:
            self._check_stop()
        except StopRequested:
            return True
        return False

    def _is_save_due(self, step: int, is_last: bool) -> bool:
        match self.settings.save_strategy:
            case "step":
                return step % self.settings.steps_freq == 0
            case "epoch":
                epoch, steps_beyond = divmod(step, self.plan.steps_per_epoch)
                return (steps_beyond == 0 and epoch % self.settings.epoch_freq == 0) or is_last
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

    def _evaluate(self, when: Literal["before", "during", "after"], *, max_examples: int | None) -> Evaluation | None:
        from trietune.evaluation.evaluate import evaluate

        if self.data.validation is None:
            return None
        begin = time.monotonic()
        self.ranks.at("evaluating", self.step)
        evaluation = evaluate(
            self.model,
            self.data.validation,
            self.encoder,
            batching=self.plan.batching,
            max_nodes=self.max_positions,
            batch_size=self.plan.eval_batch_size,
            max_examples=max_examples,
            seed=self.settings.seed,
            generate=when != "during" or self._ranks_by_answers(),
            # Sharded, every rank computes the same passes of everything, and none may leave them.
            check_stop=(lambda: None) if self.is_sharded else self.signals.check,
            progress=progress_of(self.hub, "examples"),
            ranks=ALONE if self.is_sharded else self.ranks,
        )
        self.kept_memory.give_back()
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

    def _ranks_by_answers(self) -> bool:
        """Whether periodic validations must generate: only when checkpoints are ranked by what is generated."""
        return self.settings.checkpoint_metric not in ("eval/loss", "eval/perplexity")

    def _show_predictions(self, evaluation: Evaluation, when: Literal["before", "after"]) -> None:
        from trietune.evaluation.evaluate import is_right

        assert self.data.validation is not None
        shown = []
        for prediction in evaluation.predictions[:SHOWN_PREDICTIONS]:
            example = self.data.validation.examples[prediction.index]
            verdict = is_right(prediction, self.data.task)
            expected = " / ".join(prediction.gold) if prediction.gold else "unanswerable"
            shown.append(events.Prediction(prediction.id, example.prompt, expected, prediction.text, verdict))
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
        if not self.settings.self_check or self.plan.num_steps == 0:
            return
        from trietune.model.self_check import check_against_rows

        checked = check_against_rows(
            self.model,
            self.data.train,
            self.sampler.batch(0, 0),
            batching=self.plan.batching,
            family=str(self.model.config.model_type),
        )
        if checked is not None:
            self.hub.say(
                f"self-check: {checked.num_examples} examples have a loss of {checked.loss:.5f}, "
                f"{checked.loss_of_rows:.5f} on plain rows through the library alone"
            )

    def _save(self, *, must_succeed: bool = False) -> None:
        metrics = self.measured if self.measured_step == self.step else {}
        seconds = self.keeper.save(
            self.step,
            self.epoch,
            metrics,
            self.peft_model,
            self.optimizer,
            further_state=self._further_state(),
            must_succeed=must_succeed,
        )
        self.meter.leave_out(seconds)

    def _further_state(self) -> dict[str, Any]:
        """What free memory and fp16 made of this session, for one that goes on from here."""
        state: dict[str, Any] = {"max_positions": self.max_positions, "packed_bytes": self.model.packed_bytes}
        return state if self.loss_scale is None else {**state, "loss_scale": dict(self.loss_scale.state())}

    def _take_best(self) -> int:
        """Go back to the best checkpoint's weights if they were measured better than the last; returns their step."""
        from trietune.model.adapter.adapter import set_adapter_tensors

        metrics = self.measured if self.measured_step == self.step else {}
        best = self.keeper.better_than_last(self.step, metrics)
        if best is None:
            return self.step
        step, weights = best
        set_adapter_tensors(self.peft_model, weights, where=f"step {step}")
        return step

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

    def _already_finished(self, resumed: LoadedCheckpoint) -> Run | None:
        adapter = self.plan.directory / "adapter"
        trained = self.keeper.trained_steps()
        if trained is None or trained < self.plan.num_steps:
            return None
        self.hub.say(f"{self.plan.directory.name} has finished: its adapter is in {adapter}; nothing was changed")
        return Run(self.plan.directory, "finished", resumed.step, adapter=adapter)

    # Endings

    def _finished(self, before: Evaluation | None, after: Evaluation | None, *, adapter: Path | None) -> Run:
        summary = {f"before/{k}": v for k, v in (before.metrics.items() if before else ())}
        summary.update(after.metrics if after else {})
        run = self.plan.directory
        commands = [f"trietune report {run}"]
        if adapter is not None:
            commands = [f"trietune predict {run}", f"trietune evaluate {run}", *commands]
        exit_code = self.keeper.finish_uploads(is_final=True, must_leave=self._must_leave)
        self._finish("finished", summary, commands)
        return Run(
            run,
            "finished",
            self.step,
            before=dict(before.metrics) if before else {},
            after=dict(after.metrics) if after else {},
            adapter=adapter,
            exit_code=exit_code,
        )

    def _stopped(self, reason: str, exit_code: int) -> Run:
        """Save what has been learnt; no final adapter is written."""
        commands: list[str] = []
        if self.step > 0:
            self._save(must_succeed=True)
            commands = ["the same command with `--resume` goes on from here"]
        self.keeper.finish_uploads(is_final=False, must_leave=self._must_leave)
        self.hub.say(f"stopped by {reason} after step {self.step:,}")
        self._finish("stopped", {}, commands)
        return Run(self.plan.directory, "stopped", self.step, exit_code=exit_code)

    def _must_leave(self) -> bool:
        """Whether the wait for uploads should end: a signal has come and its grace is nearly over."""
        came = self.signals.received_at
        return came is not None and time.monotonic() - came > SECONDS_TO_COPY_AFTER_SIGNAL

    def _finish(
        self, status: Literal["finished", "stopped", "failed"], summary: Mapping[str, Any], commands: Any
    ) -> None:
        self.hub.emit(events.RunFinished(status, self.step, time.monotonic() - self.began, summary, tuple(commands)))

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


def _finite(metrics: Mapping[str, float | int | None]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if value is not None}
