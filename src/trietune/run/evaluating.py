"""A run's evaluations: before, between and after its steps, on all validation examples or some."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypedDict

from trietune.data.encoder import make_encoder
from trietune.evaluation.evaluate import evaluate_model, evaluate_parts
from trietune.io.metric_names import kind_of
from trietune.ranks.ranks import ALONE, Ranks
from trietune.run.opening import progress_of
from trietune.run.show import show_predictions
from trietune.tracking import events

if TYPE_CHECKING:
    from trietune.checkpoints.store import LoadedCheckpoint
    from trietune.evaluation.evaluate import Evaluation
    from trietune.run.build import Built
    from trietune.run.early_stopping import EarlyStopping
    from trietune.run.malloc import KeptMemory
    from trietune.run.memory import MicroBatchBound
    from trietune.run.objective import Learning
    from trietune.run.prepared import Prepared
    from trietune.run.stopping import TimedStop
    from trietune.run.throughput import Throughput
    from trietune.tracking.tracker import Tracker
    from trietune.trie import Batching

When = Literal["before", "during", "after"]


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run is: steps taken, and epochs."""

    step: int
    epoch: float


class _HowToEvaluate(TypedDict):
    batching: Batching
    max_positions: int
    max_examples: int | None
    seed: int
    check_stop: Callable[[], None]
    progress: Callable[[str, int, int | None], None]


@dataclass(slots=True)
class Evaluator:
    """Measures the model of a run, and remembers its last validation.

    Attributes:
        learning: with the scores of its reference.
        metrics: of the last validation between steps.
        measured_step: whose weights these are of; None before the first.
    """

    prepared: Prepared
    built: Built
    learning: Learning
    tracker: Tracker
    ranks: Ranks
    stop: TimedStop
    bound: MicroBatchBound
    throughput: Throughput
    kept_memory: KeptMemory
    patience: EarlyStopping
    metrics: Mapping[str, float] = field(default_factory=dict)
    measured_step: int | None = None

    def metrics_of(self, step: int) -> Mapping[str, float]:
        """What was measured on exactly the weights of `step`; empty if nothing was."""
        return self.metrics if self.measured_step == step else {}

    def take_over(self, resumed: LoadedCheckpoint) -> None:
        """Believe what the checkpoint was measured at."""
        self.metrics = {name: float(value) for name, value in resumed.metrics.items() if value is not None}
        self.measured_step = resumed.step

    def validate(self, position: Position) -> None:
        """Measure between two steps, for the curve, the ranking of checkpoints and early stopping."""
        evaluation = self.evaluate("during", position, max_examples=self.prepared.plan.eval_max_examples)
        if evaluation is not None:
            self.metrics, self.measured_step = dict(evaluation.metrics), position.step
            self.patience.note(position.step, evaluation.metrics)

    def evaluate(
        self, when: When, position: Position, *, max_examples: int | None = None, weights_step: int | None = None
    ) -> Evaluation | None:
        """Measure on at most `max_examples` validation examples, and tell; None without validation data.

        Args:
            weights_step: the step whose weights are in the model, where that is not the last one.
        """
        if self.prepared.data.validation is None:
            return None
        begin = time.monotonic()
        self.ranks.at("evaluating", position.step)
        evaluation = self._measure(when, max_examples)
        self.kept_memory.give_back()
        self.throughput.leave_out(time.monotonic() - begin)
        self.tracker.emit(
            events.Evaluated(
                step=position.step,
                epoch=position.epoch,
                metrics=evaluation.metrics,
                num_examples=evaluation.num_examples,
                when=when,
                intervals=evaluation.intervals,
                weights_step=None if weights_step == position.step else weights_step,
            )
        )
        if when != "during" and evaluation.predictions:
            show_predictions(self.prepared, evaluation, position.step, when, self.tracker)
        return evaluation

    def _measure(self, when: When, max_examples: int | None) -> Evaluation:
        plan, settings, built = self.prepared.plan, self.prepared.settings, self.built
        how: _HowToEvaluate = {
            "batching": plan.batching,
            "max_positions": self.bound.max_positions,
            "max_examples": max_examples,
            "seed": settings.seed,
            # Sharded, every rank computes the same passes of everything, and none may leave them.
            "check_stop": (lambda: None) if built.is_sharded else self.stop.check,
            "progress": progress_of(self.tracker, "examples"),
        }
        if self.learning.validation is not None:
            return self.learning.evaluate(
                built.model,
                is_reference=when == "before",
                ranks=ALONE if built.is_sharded else self.ranks,
                **how,
            )
        data = self.prepared.data
        assert data.validation is not None
        # Between steps only if checkpoints are ranked by what is generated.
        generate = when != "during" or kind_of(settings.checkpoint_metric).needs_answers
        ranks = ALONE if built.is_sharded else self.ranks
        if not data.parts:
            return evaluate_model(
                built.model,
                data.validation,
                built.encoder,
                batch_size=plan.eval_batch_size,
                generate=generate,
                ranks=ranks,
                **how,
            )
        tokenizer = self.prepared.tokenizer
        parts = [(one.name, one.sequences, make_encoder(tokenizer, one.prompt_format)) for one in data.parts]
        return evaluate_parts(
            built.model, parts, batch_size=plan.eval_batch_size, generate=generate, ranks=ranks, **how
        )
