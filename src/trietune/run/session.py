"""One run in the order in which things happen: the file where the stages meet.

    find a checkpoint -> build the model -> score the reference -> restore -> prove -> evaluate
    -> train, validating and saving between steps -> evaluate -> write the adapter

The loop yields finished steps; what a step means (logged, validated, saved, the last one) is decided here.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np

from trietune.device.cpu import resident_bytes
from trietune.errors import StopRequested
from trietune.io.cache_folder import cache_folder
from trietune.ranks.ranks import ALONE, Ranks
from trietune.run.best_weights import best_weights
from trietune.run.build import Built, build
from trietune.run.cadence import Cadence
from trietune.run.checking import check_built
from trietune.run.early_stopping import EarlyStopping
from trietune.run.ending import Ending, raise_not_finite
from trietune.run.evaluating import Evaluator, Position
from trietune.run.folder import RunFolder
from trietune.run.malloc import KeptMemory
from trietune.run.memory import MicroBatchBound
from trietune.run.objective import Learning, reference_keys
from trietune.run.opening import progress_of
from trietune.run.prepared import Prepared
from trietune.run.result import Run
from trietune.run.saving import RunFiles
from trietune.run.shared_files import open_run_files
from trietune.run.show import GradientWatch, draw_first_batch, show_examples, show_start, show_step
from trietune.run.stopping import TimedStop
from trietune.run.throughput import Throughput
from trietune.tracking.tracker import Tracker
from trietune.training.loop import Step, StepRange, training_steps
from trietune.training.loss_scale import LossScale
from trietune.training.pending_losses import LossNotFiniteError
from trietune.trie import MicroBatch, make_micro_batches
from trietune.trie.dealing import Deal, deal_step

if TYPE_CHECKING:
    from trietune.checkpoints.store import LoadedCheckpoint
    from trietune.training.gradients import MicroBatchTooLargeError


def run_session(
    prepared: Prepared,
    tracker: Tracker,
    ranks: Ranks,
    folder: RunFolder,
    stop: TimedStop,
    allowed_changes: frozenset[str] = frozenset(),
) -> Run:
    """Run what was prepared, to its end; its final status is reported, also after an error.

    Args:
        allowed_changes: keys that may differ from those of the checkpoint that is resumed.

    Raises:
        UserError: a loss that is not finite, a resume that was refused, a folder that was lost.
    """
    if prepared.settings.parallelism_strategy == "fsdp":
        ranks.has_equal_passes = True
    files = open_run_files(prepared, tracker, ranks)
    ending = Ending(prepared, tracker, files, stop)
    if (finished := ending.already_finished(allowed_changes)) is not None:
        return finished
    resumed = files.find_checkpoint(allowed_changes)
    step = 0 if resumed is None else resumed.step
    try:
        files.start(resumed)
        show_start(prepared, files.environment, step, tracker)
        built = ranks.together(lambda: build(prepared, tracker, ranks))
        bound = MicroBatchBound(prepared, tracker, ranks)
        learning = _score_reference(prepared, built, files, bound, tracker, stop, ranks)
    except StopRequested as stopped:
        return ending.stopped(stopped, step, step)
    except BaseException:
        ending.failed(step)
        raise
    return Session(prepared, built, learning, bound, tracker, ranks, folder, files, stop, ending, resumed).run()


def _score_reference(
    prepared: Prepared,
    built: Built,
    files: RunFiles,
    bound: MicroBatchBound,
    tracker: Tracker,
    stop: TimedStop,
    ranks: Ranks,
) -> Learning:
    """Score all answers while the adapter is as it was at the start, where the objective compares with that."""
    return prepared.learning.with_reference(
        built.model,
        reference_keys(prepared.settings, prepared.plan, files.environment),
        cache_folder() / "data",
        plan=prepared.plan,
        max_positions=bound.max_positions,
        # Sharded, every rank computes the same passes of everything, and none may leave them.
        check_stop=(lambda: None) if built.is_sharded else stop.signals.check,
        progress=progress_of(tracker, "answers"),
        ranks=ranks,
        shares_scoring=not built.is_sharded,
    )


class Session:
    """One training under way.

    Attributes:
        position: steps taken, and epochs.
        first_step: steps that were taken before this session.
        loss_scale: for a base model in fp16.
    """

    def __init__(
        self,
        prepared: Prepared,
        built: Built,
        learning: Learning,
        bound: MicroBatchBound,
        tracker: Tracker,
        ranks: Ranks,
        folder: RunFolder,
        files: RunFiles,
        stop: TimedStop,
        ending: Ending,
        resumed: LoadedCheckpoint | None,
    ) -> None:
        self.prepared, self.settings, self.plan = prepared, prepared.settings, prepared.plan
        self.built, self.learning, self.bound = built, learning, bound
        self.tracker, self.ranks, self.folder, self.files = tracker, ranks, folder, files
        self.stop, self.ending, self.resumed = stop, ending, resumed
        self.first_step = 0 if resumed is None else resumed.step
        self.position = Position(self.first_step, 0.0)
        self.cadence = Cadence(self.settings, self.plan)
        self.throughput = Throughput()
        self.kept_memory = KeptMemory(resident_bytes)
        self.patience = EarlyStopping.of(self.settings)
        self.watch = GradientWatch(built.peft_model, self.settings, tracker)
        self.loss_scale = LossScale(self.plan.device.torch_device) if self.plan.has_loss_scale else None
        self.evaluator = Evaluator(
            prepared, built, learning, tracker, ranks, stop, bound, self.throughput, self.kept_memory, self.patience
        )

    def run(self) -> Run:
        """To the end; a stop saves what was learned."""
        try:
            return self._run()
        except StopRequested as stop:
            if self.position.step > 0:
                self._save(must_succeed=True)
            return self.ending.stopped(stop, self.position.step, self.first_step)
        except BaseException:
            self.ending.failed(self.position.step)
            raise

    def _run(self) -> Run:
        if self.resumed is not None:
            self._restore(self.resumed)
            self._measure_again(self.resumed)
        if self.settings.print_examples:
            show_examples(self.prepared, self.tracker)
        check_built(self.prepared, self.built, self.learning, self.bound, self.ranks, self.tracker)
        self.ranks.on_first(lambda: draw_first_batch(self.prepared, self.learning, self.built.sampler, self.tracker))
        before = self.evaluator.evaluate("before", self.position) if self.resumed is None else None
        if before is not None and self.plan.num_steps:
            self.patience.check(before.metrics)
        if self.plan.num_steps == 0:
            return self.ending.finished(self.position.step, before, None, adapter=None)
        self._train()
        step = self.position.step
        better = self.files.better_than_last(step, self.evaluator.metrics_of(step))
        with best_weights(self.built.peft_model, step, better) as step_of_adapter:
            after = self.evaluator.evaluate("after", self.position, weights_step=step_of_adapter)
            if not self.ranks.once(self.folder.is_in_place):
                self.ranks.once(lambda: self.folder.raise_lost(None))
            adapter = self.files.write_adapter(
                step_of_adapter,
                self.built.peft_model,
                before,
                after,
                self.built.encoder,
                trained_steps=self.position.step,
                is_stopped_early=self.patience.is_over,
            )
        return self.ending.finished(self.position.step, before, after, adapter=adapter)

    # Going on from a checkpoint

    def _restore(self, resumed: LoadedCheckpoint) -> None:
        state = self.files.restore(resumed, self.built.peft_model, self.built.optimizer)
        self.position = Position(resumed.step, float(state["epoch"]))
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale = LossScale(self.plan.device.torch_device, state["loss_scale"])
        if state.get("reference", (digest := self.learning.reference_digest())) != digest:
            self.tracker.warn(
                "the reference's scores were computed again: the same numbers up to rounding, not the same bits",
            )
        if not self.files.is_comparable(resumed) or not self.patience.restore(state.get("early_stopping")):
            self.patience.begin_anew(self.tracker.info)
        self.bound.take_over(state, self.built.model)

    def _measure_again(self, resumed: LoadedCheckpoint) -> None:
        """Take the validation that a signal cut short, so that the checkpoint of a due step is ranked after all."""
        if resumed.metrics and self.files.is_comparable(resumed):
            self.evaluator.take_over(resumed)
        elif resumed.metrics:
            # On other data, and so no figure to compare with; the checkpoint keeps the one that it was ranked by.
            self.evaluator.validate(self.position)
        elif self.cadence.is_validated(resumed.step) and self.prepared.data.validation is not None:
            self.evaluator.validate(self.position)
            self.files.saved_step = None
            self._save()

    # Training

    def _train(self) -> None:
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
            self.ranks.once(lambda: raise_not_finite(not_finite, self.prepared))
        if self.patience.is_over and self.position.step < self.plan.num_steps:
            self.tracker.info(f"training ends early, after step {self.position.step:,}: {self.patience.sentence}")

    def _steps(self) -> Generator[Step, None, None]:
        self.throughput.start()
        plan, built = self.plan, self.built
        return training_steps(
            built.model,
            built.optimizer,
            built.sampler,
            StepRange(plan.num_steps, self.position.step, plan.batches_per_step, built.learning_rate),
            self._micro_batches,
            seed=self.settings.seed,
            max_grad_norm=self.settings.max_grad_norm,
            before_update=self.watch.before_update,
            cut_smaller=self._cut_smaller,
            device=plan.device,
            loss_scale=self.loss_scale,
            is_read=self.cadence.is_read,
            learn=self.learning.learn,
            ranks=self.ranks,
            deal=None if self.ranks is ALONE else self._deal,
            make_part=lambda sequences: self._lay_out(self.learning.rows.apart(sequences)),
            wants_stop=self._wants_stop,
        )

    def _micro_batches(self, indices: np.ndarray) -> list[MicroBatch]:
        return self._lay_out(self.learning.rows.parts_of(indices))

    def _lay_out(self, parts: Sequence[np.ndarray]) -> list[MicroBatch]:
        rows, batching, bound = self.learning.rows, self.plan.batching, self.bound.max_positions
        return [
            micro_batch
            for part in parts
            for micro_batch in self.built.model.pad_to_shapes(
                make_micro_batches(rows, part, batching=batching, max_positions=bound)
            )
        ]

    def _deal(self, indices: np.ndarray) -> Deal:
        rows = self.learning.rows
        return deal_step(
            rows,
            rows.sequences_of(indices),
            self.ranks.count,
            batching=self.plan.batching,
            label_cost=self.plan.label_cost,
        )

    def _cut_smaller(self, error: MicroBatchTooLargeError) -> None:
        self.bound.halve(error, self.position.step + 1, self.built.model)

    def _after_step(self, step: Step) -> None:
        """Log, validate, save, and stop if it is time to."""
        self.position = Position(step.number, step.epoch)
        self.kept_memory.after_step()
        show_step(
            self.prepared,
            step,
            self.throughput,
            self.ranks,
            self.tracker,
            is_logged=self.cadence.is_logged(step.number),
        )
        is_last = step.number == self.plan.num_steps
        is_saved = self.cadence.is_saved(step.number, is_last=is_last)
        self._check_folder(step, must_know=is_saved)
        if self.cadence.is_validated(step.number) or is_saved or is_last:
            self.evaluator.validate(self.position)
        is_over = is_last or self.patience.is_over
        if is_saved or self.cadence.is_saved(step.number, is_last=is_over):
            self._save()
        self.files.tell_uploads()
        if not is_over:
            self.ranks.stop_together(self._check_stop, step.num_stopping)

    def _check_stop(self) -> None:
        self.stop.check_step(self.throughput.slowest_step)

    def _wants_stop(self) -> bool:
        """Whether this process wants to stop after the step under way; of one process, it is asked afterwards."""
        if self.ranks is ALONE:
            return False
        try:
            self._check_stop()
        except StopRequested:
            return True
        return not self.folder.is_in_place()

    def _check_folder(self, step: Step, *, must_know: bool) -> None:
        """Stop when the folder was moved or removed; what was learned is saved where it is now.

        Of several ranks, the one that holds the folder told with the step's numbers if it was lost by then.

        Args:
            must_know: whether that was too early to ask.
        """
        if not (self.ranks is ALONE or must_know or step.num_stopping):
            return
        is_in_place, now_at = self.ranks.once(self.folder.find)
        if is_in_place:
            return
        if now_at is not None:
            self.files.move_to(now_at)
            self._save(must_succeed=True)
        self.ranks.once(lambda: self.folder.raise_lost(now_at))

    # Saving

    def _save(self, *, must_succeed: bool = False) -> None:
        seconds = self.files.save(
            self.position.step,
            self.position.epoch,
            self.evaluator.metrics_of(self.position.step),
            self.built.peft_model,
            self.built.optimizer,
            further_state=self._further_state(),
            must_succeed=must_succeed,
        )
        self.throughput.leave_out(seconds)

    def _further_state(self) -> Mapping[str, object]:
        """What free memory, fp16 and patience made of this session, for one that resumes from here."""
        state = self.bound.state(self.built.model)
        if self.patience.patience is not None:
            state["early_stopping"] = self.patience.state()
        if (digest := self.learning.reference_digest()) is not None:
            state["reference"] = digest
        if self.loss_scale is not None:
            state["loss_scale"] = dict(self.loss_scale.state())
        return state
