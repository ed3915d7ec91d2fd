"""A run from its settings to its adapter: the file where the stages meet.

    settings -> prepare (plan, data, base model) -> Session: evaluate, train, save, evaluate -> Run

The loop yields finished steps; what a step means (logged, validated, saved, the last one) is decided here.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from trietune.checkpoints.lock import LOCK_NAME, RunLock
from trietune.checkpoints.messages import folder_lost
from trietune.checkpoints.probe import check_folder, check_place, check_plain_files
from trietune.checkpoints.store import LoadedCheckpoint
from trietune.errors import EXIT_DONE, EXIT_LOSS_NOT_FINITE, StopRequested, UserError
from trietune.io.files import make_folders, remove_tree
from trietune.io.metric_names import kind_of
from trietune.ranks.opening import open_ranks
from trietune.ranks.ranks import ALONE, Ranks
from trietune.run.early_stopping import EarlyStopping
from trietune.run.malloc import KeptMemory, give_back_freed_memory, hand_back_freed_memory, keep_freed_memory
from trietune.run.objective import reference_keys
from trietune.run.prepare import Prepared, adapter_arguments, prepare_together, progress_of, run_directory
from trietune.run.proving import positions_on_rows, positions_under_masks, prove_on_data, prove_on_host
from trietune.run.shared_files import open_run_files
from trietune.run.signals import StopSignals
from trietune.run.throughput import Throughput
from trietune.tracking import events
from trietune.tracking.jsonl import CONFIG, ENVIRONMENT, LINE_FILES
from trietune.tracking.open import open_tracker
from trietune.tracking.tracker import Tracker
from trietune.tracking.wandb.listener import are_histograms_due, watched_kinds

if TYPE_CHECKING:
    from trietune.config.settings import Settings
    from trietune.evaluation.evaluate import Evaluation
    from trietune.model.causal_lm import TrieModel
    from trietune.model.proof import Proof
    from trietune.training.gradients import MicroBatchTooLargeError
    from trietune.training.loop import Step
    from trietune.training.loss_scale import LossScale
    from trietune.training.pending_losses import LossNotFiniteError

# What a run writes in its folder beside its lines and its checkpoints.
OTHER_FILES = (CONFIG, ENVIRONMENT, ".run-id", "report.html", "wandb.json")
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
        exit_code: what a command should exit with.
    """

    directory: Path
    status: Literal["finished", "stopped"]
    step: int
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    adapter: Path | None = None
    exit_code: int = EXIT_DONE


def train(
    settings: Settings,
    *,
    tracker: Tracker | None = None,
    allowed_changes: frozenset[str] = frozenset(),
    began: float | None = None,
) -> Run:
    """Train the adapter that `settings` describe; of several processes that a launcher started, each its part.

    Args:
        tracker: who hears of the run's events; by default its files, the console, and the tracker that the settings
            name.
        allowed_changes: keys that may differ from those of the checkpoint that is resumed.
        began: when the command began, as `time.monotonic` tells it, for `max_time`; None: now.

    Raises:
        UserError: a mistake in settings or data, a loss that is not finite, a resume that was refused, or a process
            that was lost.
        StopRequested: a signal came before there was anything to save.
    """
    began = time.monotonic() if began is None else began
    with ExitStack() as stack:
        if settings.parallelism_strategy == "fsdp":
            hand_back_freed_memory()
        elif keep_freed_memory():
            stack.callback(give_back_freed_memory)
        signals = stack.enter_context(StopSignals())
        ranks = open_ranks(may_use_cuda=settings.device in ("auto", "cuda"))
        stack.callback(ranks.close)
        tracker = ranks.first_of(lambda: tracker or _open_tracker(settings), Tracker)
        stack.callback(tracker.close)
        stop = TimedStop(signals, settings.max_time, began)
        ranks.once(lambda: check_place(run_directory(settings), where=settings.where("project_dir")))
        prepared = prepare_together(settings, tracker, stop.check, ranks)
        locks: list[RunLock] = []
        # Rank 0 holds the folder for all.
        ranks.once(lambda: locks.append(stack.enter_context(_folder_of(prepared.plan.directory))))
        lock = locks[0] if locks else None
        return Session(prepared, tracker, signals, lock, began, allowed_changes, ranks).run()


def _open_tracker(settings: Settings) -> Tracker:
    return open_tracker(
        tracker=settings.tracker,
        use_wandb=settings.use_wandb,
        project=settings.wandb_project,
        run_name=settings.wandb_run_name,
        tags=settings.wandb_tags,
        model_to_wandb=settings.model_to_wandb,
    )


@dataclass(frozen=True, slots=True)
class TimedStop:
    """A stop by signal, or because `max_time` is nearly over; for long work between steps.

    Attributes:
        max_time: seconds from `began`; None: no limit.
        began: when the command began, by `time.monotonic`.
    """

    signals: StopSignals
    max_time: float | None
    began: float

    def check(self) -> None:
        """Raise `StopRequested` if it is time to leave."""
        self.signals.check()
        if self.max_time is not None and time.monotonic() - self.began > self.max_time - SECONDS_LEFT_TO_SAVE:
            raise StopRequested("max_time", EXIT_DONE)


@contextmanager
def _folder_of(directory: Path) -> Iterator[RunLock]:
    """The run's folder, made if need be, locked and tried; one that was made for nothing goes again."""
    is_new = not os.path.lexists(directory)
    make_folders(directory)
    with RunLock(directory) as lock:
        try:
            check_plain_files(directory, (*LINE_FILES, *OTHER_FILES))
            check_folder(directory)
            yield lock
        except (UserError, StopRequested):
            if is_new and lock.is_in_place():
                _remove_if_empty(directory)
            raise


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        if {path.name for path in directory.iterdir()} <= {LOCK_NAME}:
            remove_tree(directory)


class Session:
    """One run under way: the model, where its events go, and what has been measured so far."""

    def __init__(
        self,
        prepared: Prepared,
        tracker: Tracker,
        signals: StopSignals,
        lock: RunLock | None,
        began: float,
        allowed_changes: frozenset[str] = frozenset(),
        ranks: Ranks = ALONE,
    ) -> None:
        from trietune.device.cpu import resident_bytes

        self.settings = prepared.settings
        self.plan = prepared.plan
        self.data = prepared.data
        self.base = prepared.base
        self.groups = prepared.groups
        self.learning = prepared.learning
        self.start = prepared.start
        self.tokenizer = prepared.tokenizer
        self.tracker = tracker
        self.signals = signals
        self.lock = lock
        self.ranks = ranks
        self.is_sharded = self.settings.parallelism_strategy == "fsdp"
        if self.is_sharded:
            ranks.has_equal_passes = True
        self.allowed_changes = allowed_changes
        self.began = began
        self.stop = TimedStop(signals, self.settings.max_time, began)
        self.step = self.first_step = 0
        self.epoch = 0.0
        self.measured: dict[str, float] = {}
        self.measured_step: int | None = None
        self.patience = EarlyStopping.of(self.settings)
        self.max_positions = self.plan.max_positions
        self.files = open_run_files(prepared, tracker, ranks)
        self.throughput = Throughput()
        self.kept_memory = KeptMemory(resident_bytes)
        self.loss_scale: LossScale | None = None
        self.looked_for_gradients = False

    # The run, in the order in which things happen

    def run(self) -> Run:
        """Run to the end and report the final status, also after an error."""
        if (finished := self._already_finished()) is not None:
            return finished
        resumed = self.files.find_checkpoint(self.allowed_changes)
        try:
            return self._run(resumed)
        except StopRequested as stop:
            return self._stopped(stop.signal_name, stop.exit_code)
        except BaseException:
            self._finish("failed", {}, ())
            raise

    def _run(self, resumed: LoadedCheckpoint | None) -> Run:
        from trietune.training.pending_losses import LossNotFiniteError

        self._start(resumed)
        self.ranks.together(self._build_model)
        self._score_reference()
        if resumed is not None:
            self._restore(resumed)
            self._measure_again(resumed)
        if self.settings.print_examples:
            self._show_examples()
        self._self_check()
        self.ranks.on_first(self._draw_batch)
        before = self._evaluate("before", max_examples=None) if resumed is None else None
        if before is not None and self.plan.num_steps:
            self.patience.check(before.metrics)
        if self.plan.num_steps == 0:
            return self._finished(before, None, adapter=None)
        try:
            with closing(self._steps()) as steps:
                # A run may have been killed between the end of its patience and its adapter.
                for step in () if self.patience.is_over else steps:
                    self._after_step(step)
                    if self.patience.is_over:
                        break
        except LossNotFiniteError as error:
            # Every rank knows; one says it.
            not_finite = error
            self.ranks.once(lambda: self._raise_not_finite(not_finite))
        if self.patience.is_over and self.step < self.plan.num_steps:
            self.tracker.info(f"training ends early, after step {self.step:,}: {self.patience.sentence}")
        with self._best_weights() as step_of_adapter:
            after = self._evaluate("after", max_examples=None, weights_step=step_of_adapter)
            if not self.ranks.once(self._is_in_place):
                self.ranks.once(lambda: self._raise_folder_lost(None))
            adapter = self.files.write_adapter(
                step_of_adapter,
                self.peft_model,
                before,
                after,
                self.encoder,
                trained_steps=self.step,
                is_stopped_early=self.patience.is_over,
            )
        return self._finished(before, after, adapter=adapter)

    def _restore(self, resumed: LoadedCheckpoint) -> None:
        from trietune.training.loss_scale import LossScale

        state = self.files.restore(resumed, self.peft_model, self.optimizer)
        self.epoch = float(state["epoch"])
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale = LossScale(self.plan.device.torch_device, state["loss_scale"])
        if state.get("reference", (digest := self.learning.reference_digest())) != digest:
            self.tracker.warn(
                "the reference's scores were computed again: the same numbers up to rounding, not the same bits",
            )
        if not self.files.is_comparable(resumed) or not self.patience.restore(state.get("early_stopping")):
            self.patience.begin_anew(self.tracker.info)
        self._take_over_memory(state)

    def _take_over_memory(self, state: Mapping[str, Any]) -> None:
        """Cut batches and pack weights as before, whatever memory is free now, so that the numbers are the same."""
        from trietune.model.fast.frozen_weight import pack_frozen_weights

        before, packed = state.get("max_positions"), state.get("packed_bytes")
        if self.settings.max_tokens_per_micro_batch == "auto" and before is not None:
            if self.max_positions < before:
                self.tracker.info(
                    f"less memory is free than before: micro-batches of at most {self.max_positions:,} tokens instead "
                    f"of {before:,}; a batch that is cut differently has the same gradients up to rounding"
                )
            self.max_positions = min(self.max_positions, before)
        if self.is_sharded:
            return
        if self.settings.pack_weights == "auto" and packed is not None and packed != self.model.packed_bytes:
            most = min(packed, self.model.packed_bytes)
            self.model.packed_bytes = pack_frozen_weights(self.model.network, most_bytes=most)
            if self.model.packed_bytes != packed:
                self.tracker.info(
                    "less memory is free than before, so fewer weights are packed: the same numbers up to rounding, "
                    "not the same bits"
                )

    def _measure_again(self, resumed: LoadedCheckpoint) -> None:
        """Take the validation that a signal cut short, so that the checkpoint of a due step is ranked after all."""
        if resumed.metrics and self.files.is_comparable(resumed):
            self.measured, self.measured_step = _finite(resumed.metrics), resumed.step
        elif resumed.metrics:
            # On other data, and so no figure to compare with; the checkpoint keeps the one that it was ranked by.
            self._validate()
        elif resumed.step % self.settings.val_steps_freq == 0 and self.data.validation is not None:
            self._validate()
            self.files.saved_step = None
            self._save()

    def _start(self, resumed: LoadedCheckpoint | None) -> None:
        self.files.start(resumed)
        if resumed is not None:
            self.step = self.first_step = resumed.step
        self.tracker.emit(
            events.RunStarted(
                name=self.plan.directory.name,
                directory=self.plan.directory,
                num_steps=self.plan.num_steps,
                first_step=self.step,
                config=self.settings.dump_public(),
                environment=self.files.environment,
                plan=self.plan.lines(),
            )
        )

    def _build_model(self) -> None:
        from trietune.data.encoder import make_encoder
        from trietune.model.adapter.adapter import adapter_files, add_adapter
        from trietune.model.adapter.reread import check_reread, twin_of
        from trietune.model.assemble import assemble
        from trietune.model.base.load import load_network
        from trietune.model.base.randomness import silence_draws, silence_rates
        from trietune.training.loss_scale import LossScale
        from trietune.training.optimizer import build_optimizer
        from trietune.training.sampler import Sampler
        from trietune.training.schedule import learning_rate_schedule

        device = self.plan.device
        device.watch_memory()
        self.tracker.info(f"loading {self.base.name}")
        if self.is_sharded:
            from trietune.model.base.load_sharded import gathering, load_sharded

            network = load_sharded(
                self.base, dtype=self.plan.dtype, device=device.loading_device, report=self.tracker.info
            )
        else:
            network = load_network(
                self.base,
                dtype=self.plan.dtype,
                device=device.loading_device,
                load_in_4bit=self.plan.load_in_4bit,
                report=self.tracker.info,
            )
        keeps_dropout = self.settings.base_dropout and bool(self.plan.base_rates)
        if not self.settings.base_dropout:
            silence_rates(network)
            if drawing := silence_draws(network):
                self.tracker.info(f"stopped from drawing random numbers: {_few(drawing)}")
        twin = twin_of(network) if self.plan.num_steps > 0 and not self.is_sharded else None
        self.peft_model = add_adapter(network, base=self.base, **adapter_arguments(self.settings))
        if twin is not None:
            # One rank is enough: all put the same adapter onto the same network.
            self.ranks.on_first(
                lambda: check_reread(self.peft_model, twin, lambda model: adapter_files(model, self.base))
            )
            del twin
        elif self.is_sharded and self.plan.num_steps > 0:
            self.tracker.info(
                "not checked before training: whether plain PEFT reads the adapter as the trained model, since "
                "no process holds the whole base model"
            )
        if self.start is not None:
            from trietune.model.adapter.start import start_from

            start_from(self.peft_model, self.start)
        on_host = self._prove_on_host(network)
        self.model = assemble(
            network,
            device,
            attention=self.plan.attention,
            fused_layers=self.settings.fused_layers and not keeps_dropout,
            pack_weights=False if self.is_sharded else self.settings.pack_weights,
            shapes=self.plan.static.shapes if self.plan.static else None,
            gradient_checkpointing=self.settings.gradient_checkpointing,
            whole=gathering(network) if self.is_sharded else nullcontext,
            why_whole_rows=self.plan.why_whole_rows,
        )
        if on_host is not None:
            self.model.needs_masks = on_host.needs_masks
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

    def _score_reference(self) -> None:
        """Score all answers while the adapter is as it was at the start, where the objective compares with that."""
        from trietune.io.cache_folder import cache_folder

        self.learning = self.learning.with_reference(
            self.model,
            reference_keys(self.settings, self.plan, self.files.environment),
            cache_folder() / "data",
            plan=self.plan,
            max_positions=self.max_positions,
            check_stop=self.signals.check,
            progress=progress_of(self.tracker, "answers"),
        )

    def _steps(self) -> Any:
        from trietune.training.loop import StepRange, training_steps

        self.throughput.start()
        return training_steps(
            self.model,
            self.optimizer,
            self.sampler,
            StepRange(self.plan.num_steps, self.step, self.plan.batches_per_step, self.learning_rate),
            self._micro_batches,
            seed=self.settings.seed,
            max_grad_norm=self.settings.max_grad_norm,
            before_update=self._before_update,
            cut_smaller=self._cut_smaller,
            device=self.plan.device,
            loss_scale=self.loss_scale,
            is_read=self._is_read,
            learn=self.learning.learn,
            ranks=self.ranks,
            deal=None if self.ranks is ALONE else self._deal,
            wants_stop=self._wants_stop,
        )

    def _deal(self, indices: Any) -> Any:
        from trietune.trie.dealing import deal_step

        # What several processes learn from has one sequence per row.
        return deal_step(
            self.data.train,
            indices,
            self.ranks.count,
            batching=self.plan.batching,
            label_cost=self.plan.label_cost,
        )

    def _micro_batches(self, indices: Any) -> Any:
        from trietune.trie import make_micro_batches

        rows = self.learning.rows
        return [
            micro_batch
            for part in rows.parts_of(indices)
            for micro_batch in self.model.pad_to_shapes(
                make_micro_batches(rows, part, batching=self.plan.batching, max_positions=self.max_positions)
            )
        ]

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
        if self.model.most_cells is not None:
            self.model.most_cells = max(self.model.most_cells // 2, error.longest)
        redrawn = "; dropout draws new masks" if self.settings.lora_dropout or self.settings.base_dropout else ""
        self.tracker.warn(
            f"memory ran out at a micro-batch of {error.num_positions:,} tokens: at most {self.max_positions:,} from "
            f"here on, and step {self.step + 1:,} begins again{redrawn}",
        )

    def _raise_too_long(self, error: MicroBatchTooLargeError) -> None:
        raise UserError(
            f"not enough memory for one example of {error.longest:,} tokens",
            where=f"step {self.step + 1}, on {self.plan.device.name}; checkpoints of earlier steps are whole",
            next_step="`--set gradient_checkpointing=True`"
            if not self.settings.gradient_checkpointing
            else f"drop longer examples with `--set max_length={max(error.longest // 2, 1)}`, or use a smaller "
            "base model",
        ) from error

    def _write_memory_snapshot(self) -> None:
        """What took memory until it ran out, the first time."""
        path = self.plan.directory / "memory_snapshot.pickle"

        def write() -> None:
            try:
                if not path.exists() and self.plan.device.write_memory_snapshot(path):
                    self.tracker.info(f"{path} shows what used the memory; open it at https://pytorch.org/memory_viz")
            except OSError as error:
                self.tracker.warn(f"no memory snapshot: {error}")

        self.ranks.on_first(write)

    def _after_step(self, step: Step) -> None:
        """Log, validate, save, and stop if it is time to."""
        self.step, self.epoch = step.number, step.epoch
        self.kept_memory.after_step()
        is_last, device = step.number == self.plan.num_steps, self.plan.device
        self.tracker.emit(
            events.StepFinished(
                step=step.number,
                epoch=step.epoch,
                metrics=self.throughput.metrics(
                    step, device.used_memory_bytes(), device.compilations(), waiting_share=self.ranks.waiting_share
                ),
                example_ids=[self.data.train.row_id(row) for row in step.sequence_indices],
                is_logged=self._is_logged(step.number),
            )
        )
        is_saved = self._is_save_due(step.number, is_last)
        self._check_folder(step, must_know=is_saved)
        if step.number % self.settings.val_steps_freq == 0 or is_saved or is_last:
            self._validate()
        is_over = is_last or self.patience.is_over
        if is_saved or self._is_save_due(step.number, is_over):
            self._save()
        self.files.tell_uploads()
        if not is_over:
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
        return not self._is_in_place()

    def _check_folder(self, step: Step, *, must_know: bool) -> None:
        """Stop when the folder was moved or removed; what was learned is saved where it is now.

        Of several ranks, the one that holds the folder told with the step's numbers if it was lost by then.

        Args:
            must_know: whether that was too early to ask.
        """
        if not (self.ranks is ALONE or must_know or step.num_stopping):
            return
        is_in_place, now_at = self.ranks.once(self._find_folder)
        if is_in_place:
            return
        if now_at is not None:
            self.files.move_to(now_at)
            self._save(must_succeed=True)
        self.ranks.once(lambda: self._raise_folder_lost(now_at))

    def _find_folder(self) -> tuple[bool, Path | None]:
        """Whether the run's folder is in its place, and else where it is now, if that can be told."""
        if self.lock is None or self.lock.is_in_place():
            return True, None
        return False, self.lock.moved_to()

    def _is_in_place(self) -> bool:
        return self.lock is None or self.lock.is_in_place()

    def _raise_folder_lost(self, now_at: Path | None) -> NoReturn:
        raise folder_lost(self.plan.directory, now_at)

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
        if left < STEPS_LEFT_TO_SAVE * self.throughput.slowest_step + SECONDS_LEFT_TO_SAVE:
            raise StopRequested("max_time", EXIT_DONE)

    # Evaluation

    def _validate(self) -> None:
        evaluation = self._evaluate("during", max_examples=self.plan.eval_max_examples)
        if evaluation is not None:
            self.measured, self.measured_step = dict(evaluation.metrics), self.step
            self.patience.note(self.step, evaluation.metrics)

    def _evaluate(
        self, when: Literal["before", "during", "after"], *, max_examples: int | None, weights_step: int | None = None
    ) -> Evaluation | None:
        from trietune.evaluation.evaluate import evaluate_model

        if self.data.validation is None:
            return None
        begin = time.monotonic()
        self.ranks.at("evaluating", self.step)
        common: dict[str, Any] = {
            "batching": self.plan.batching,
            "max_positions": self.max_positions,
            "max_examples": max_examples,
            "seed": self.settings.seed,
            # Sharded, every rank computes the same passes of everything, and none may leave them.
            "check_stop": (lambda: None) if self.is_sharded else self.stop.check,
            "progress": progress_of(self.tracker, "examples"),
        }
        if self.learning.validation is not None:
            evaluation = self.learning.evaluate(self.model, is_reference=when == "before", **common)
        else:
            evaluation = evaluate_model(
                self.model,
                self.data.validation,
                self.encoder,
                batch_size=self.plan.eval_batch_size,
                generate=when != "during" or self._ranks_by_answers(),
                ranks=ALONE if self.is_sharded else self.ranks,
                **common,
            )
        self.kept_memory.give_back()
        self.throughput.leave_out(time.monotonic() - begin)
        self.tracker.emit(
            events.Evaluated(
                step=self.step,
                epoch=self.epoch,
                metrics=evaluation.metrics,
                num_examples=evaluation.num_examples,
                when=when,
                intervals=evaluation.intervals,
                weights_step=None if weights_step == self.step else weights_step,
            )
        )
        if when != "during" and evaluation.predictions:
            self._tell_predictions(evaluation, when)
        return evaluation

    def _ranks_by_answers(self) -> bool:
        """Whether periodic validations must generate: only when checkpoints are ranked by what is generated."""
        return kind_of(self.settings.checkpoint_metric).needs_answers

    def _tell_predictions(self, evaluation: Evaluation, when: Literal["before", "after"]) -> None:
        from trietune.run.predictions import described

        assert self.data.validation is not None
        told = described(evaluation.predictions, self.data.validation.examples, self.data.task)
        num_shown = SHOWN_PREDICTIONS if self.settings.print_examples else 0
        self.tracker.emit(events.PredictionsShown(self.step, when, told, num_shown))

    def _show_examples(self) -> None:
        from trietune.data.preview import preview_examples

        previews = preview_examples(self.data.train, self.tokenizer, SHOWN_EXAMPLES)
        self.tracker.emit(
            events.ExamplesShown(
                [events.MarkedExample(p.id, [(t.text, t.is_label) for t in p.tokens]) for p in previews]
            )
        )

    def _self_check(self) -> None:
        if not self.settings.self_check or self.plan.num_steps == 0:
            self._bound_rows()
            return
        if not self.plan.device.has_static_shapes:
            # Every rank proves what it will compute, on rows of one length; all end if one fails.
            free_bytes = min(self.ranks.gather(self.plan.device.free_memory_bytes()))
            self.ranks.together(lambda: self._prove(free_bytes))
            self.max_positions = min(self.ranks.gather(self.max_positions))
            self._bound_rows()
            return
        from trietune.model.self_check import check_against_rows

        checked = check_against_rows(
            self.model,
            self.learning.rows,
            self.learning.rows.sequences_of(self.sampler.batch(0, 0)),
            batching=self.plan.batching,
            family=str(self.model.config.model_type),
        )
        if checked is not None:
            self.tracker.info(
                f"self-check: {checked.num_examples} examples have a loss of {checked.loss:.5f}, "
                f"{checked.loss_of_rows:.5f} on plain rows through transformers, both on the device"
            )

    def _prove(self, free_bytes: int) -> None:
        proof = self._prove_on_data(self.model, free_bytes)
        if proof is None or not proof.needs_masks:
            return
        bound = positions_under_masks(
            self.settings,
            self.model.config,
            self.plan.dtype,
            self.plan.device.free_memory_bytes(),
            trains=True,
        )
        if bound < self.max_positions:
            self.tracker.info(f"masks grow with the square of their length: micro-batches of at most {bound:,} tokens")
            self.max_positions = bound

    def _bound_rows(self) -> None:
        """Where tries run on whole rows, what is computed at once is counted in their positions."""
        if self.model.whole_rows is None:
            return
        free_bytes, checkpointing = self.plan.device.free_memory_bytes(), self.settings.gradient_checkpointing
        bound = positions_on_rows(self.settings, self.model, free_bytes, gradient_checkpointing=checkpointing)
        self.model.most_cells = min(self.ranks.gather(bound))

    def _prove_on_host(self, network: Any) -> Proof | None:
        """Layers are proven before a device of static shapes takes them: there each pass would be compiled."""
        if not (self.plan.device.has_static_shapes and self.settings.self_check and self.plan.num_steps):
            return None
        free_bytes = self.plan.device.free_memory_bytes()
        return prove_on_host(network, lambda model: self._prove_on_data(model, free_bytes), say=self.tracker.info)

    def _prove_on_data(self, model: TrieModel, free_bytes: int) -> Proof | None:
        return prove_on_data(
            model,
            self.data.train,
            self.data.validation,
            batching=self.plan.batching,
            with_gradients=True,
            free_bytes=free_bytes,
            say=self.tracker.info,
        )

    def _draw_batch(self) -> None:
        """Keep the first batch as a picture, for the report."""
        from trietune.run.batch_picture import write_batch_picture

        if self.plan.num_steps == 0 or self.plan.batching != "trie":
            return
        rows = self.learning.rows
        batch = [(row, sequence) for row in self.sampler.batch(0, 0) for sequence in rows.sequences_of(np.array([row]))]
        indices = np.array([sequence for _, sequence in batch], np.int64)
        ids = [self.data.train.row_id(row) for row, _ in batch]
        try:
            write_batch_picture(self.plan.directory, rows, indices, ids, self.tokenizer)
        except OSError as error:
            self.tracker.warn(f"the report has no picture of a batch: {error}")

    def _save(self, *, must_succeed: bool = False) -> None:
        metrics = self.measured if self.measured_step == self.step else {}
        seconds = self.files.save(
            self.step,
            self.epoch,
            metrics,
            self.peft_model,
            self.optimizer,
            further_state=self._further_state(),
            must_succeed=must_succeed,
        )
        self.throughput.leave_out(seconds)

    def _further_state(self) -> dict[str, Any]:
        """What free memory and fp16 made of this session, for one that goes on from here."""
        state: dict[str, Any] = {"max_positions": self.max_positions, "packed_bytes": self.model.packed_bytes}
        if self.patience.patience is not None:
            state["early_stopping"] = self.patience.state()
        if (digest := self.learning.reference_digest()) is not None:
            state["reference"] = digest
        return state if self.loss_scale is None else {**state, "loss_scale": dict(self.loss_scale.state())}

    @contextmanager
    def _best_weights(self) -> Iterator[int]:
        """The best checkpoint's weights in the model if they were measured better than the last; gives their step.

        However the block ends, the last step's weights are back by then: a stop saves them under the last step's name.
        """
        from trietune.model.adapter.adapter import adapter_tensors, overwrite_tensors, set_adapter_tensors

        metrics = self.measured if self.measured_step == self.step else {}
        best = self.files.better_than_last(self.step, metrics)
        if best is None:
            yield self.step
            return
        step, weights = best
        live = adapter_tensors(self.peft_model)
        last = {name: tensor.detach().to("cpu", copy=True) for name, tensor in live.items()}
        try:
            set_adapter_tensors(self.peft_model, weights, where=f"step {step}")
            yield step
        finally:
            overwrite_tensors(live, last)

    def _before_update(self, step: int) -> None:
        if not self.looked_for_gradients:
            self.looked_for_gradients = True
            self._warn_of_untrained()
        self._emit_histograms(step)

    def _warn_of_untrained(self) -> None:
        """Adapters whose layer is passed by, such as those of parts that text does not go through."""
        trained = {name: p for name, p in self.peft_model.named_parameters() if p.requires_grad}
        without = [name for name, parameter in trained.items() if parameter.grad is None]
        if without:
            layers = list(dict.fromkeys(name.removeprefix("base_model.model.").split(".lora_")[0] for name in without))
            self.tracker.warn(
                f"{len(without)} of the adapter's {len(trained)} tensors got no gradient in the first step, on "
                f"{_few(layers)}: they stay unchanged unless later examples reach them",
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
        self.tracker.emit(events.Histograms(step, arrays))

    def _already_finished(self) -> Run | None:
        finished = self.files.finished(self.allowed_changes)
        if finished is None:
            return None
        trained, place = finished
        name = self.plan.directory.name
        self.tracker.info(f"{name} has already finished: its adapter is in {place}; nothing was changed")
        adapter = self.plan.directory / "adapter"
        return Run(self.plan.directory, "finished", trained, adapter=adapter if adapter.is_dir() else None)

    # Endings

    def _finished(self, before: Evaluation | None, after: Evaluation | None, *, adapter: Path | None) -> Run:
        summary = {f"before/{k}": v for k, v in (before.metrics.items() if before else ())}
        summary.update(after.metrics if after else {})
        run = self.plan.directory
        commands = [f"trietune report {run}"]
        if adapter is not None:
            commands = [f"trietune predict {run}", f"trietune evaluate {run}", *commands]
        exit_code = self.files.finish_uploads(is_final=True, must_leave=self._must_leave)
        if adapter is not None:
            exit_code = self.files.push_to_hub(adapter) or exit_code
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
        """Save what has been learned; no final adapter is written."""
        commands: list[str] = []
        if self.step > 0:
            self._save(must_succeed=True)
            commands = ["run the same command with `--resume` to continue"]
        self.files.finish_uploads(is_final=False, must_leave=self._must_leave)
        self.tracker.info(f"stopped by {reason} after step {self.step:,}")
        if reason == "max_time" and self.step == self.first_step:
            self.tracker.warn("no step was taken: `max_time` ran out before the first one")
        self._finish("stopped", {}, commands)
        return Run(self.plan.directory, "stopped", self.step, exit_code=exit_code)

    def _must_leave(self) -> bool:
        """Whether the wait for uploads should end: a signal has come and its grace is nearly over."""
        came = self.signals.received_at
        return came is not None and time.monotonic() - came > SECONDS_TO_COPY_AFTER_SIGNAL

    def _finish(
        self, status: Literal["finished", "stopped", "failed"], summary: Mapping[str, Any], commands: Any
    ) -> None:
        self.tracker.emit(
            events.RunFinished(status, self.step, time.monotonic() - self.began, summary, tuple(commands))
        )

    def _raise_not_finite(self, error: LossNotFiniteError) -> None:
        ids = [self.data.train.row_id(row) for row in error.sequence_indices]
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


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _finite(metrics: Mapping[str, float | int | None]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if value is not None}
