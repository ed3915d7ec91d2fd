"""How long a run will take, how much memory, and what that costs: from the real data's tries and a model of a step.

    step = products / (FLOP per second) + what is read and written / bandwidth + operations x what it takes to start one

A card computes while the host starts the next operations, so there the larger one of the two counts. Each quantity is a
range, and what cannot be told is left out and named.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trietune.io.metric_names import kind_of
from trietune.run.prepared import Prepared
from trietune.trie import make_micro_batches
from trietune.trie.batch_stats import Work, measure_work

if TYPE_CHECKING:
    from trietune.device.figures import Range, Speed

# Operations that are started for a layer, forward and backward.
OPERATIONS_A_LAYER = 110
# Of these, without a backward.
FORWARD_PART = 0.35
# Times that what a layer keeps is written and read.
PASSES_OVER_KEPT = 3
# Numbers that the optimizer reads and writes for a trained one, in fp32.
OPTIMIZER_NUMBERS = 12
# Of a step: FLOP for each number of a frozen matrix and each position (forward, and the gradient of its input), and of
# a trained one, whose own gradient is computed too.
FROZEN_FLOPS, TRAINED_FLOPS = 4, 6
# FLOP for each query, key and number of a head: two products forward, four backward.
FORWARD_SCORES, STEP_SCORES = 4, 12
# Larger validation sets are looked at in part.
MOST_LAID_OUT = 4000
PROCESS_BYTES = 0.5e9
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run takes; times in seconds, each from the least to the most that is likely.

    Attributes:
        step: one optimizer step.
        num_steps: steps of the run.
        validation: all evaluations together.
        reference: scoring the reference, where the objective has one.
        memory: bytes of one process, at the largest micro-batch that was seen.
        num_processes: processes that share each step.
        flops_a_step: of all processes.
        unknown: why there is no time; None where there is one.
    """

    speed: Speed
    step: Range
    num_steps: int
    validation: Range
    reference: Range
    memory: float
    num_processes: int
    flops_a_step: float
    unknown: str | None = None

    @property
    def training(self) -> Range:
        """All steps."""
        return self.num_steps * self.step[0], self.num_steps * self.step[1]

    @property
    def total(self) -> Range:
        """Everything that is estimated."""
        parts = (self.training, self.validation, self.reference)
        return sum(part[0] for part in parts), sum(part[1] for part in parts)

    @property
    def fits(self) -> bool:
        """Whether the memory of a device suffices."""
        return self.memory <= self.speed.memory

    def cost(self, price: float) -> Range:
        """Of the whole run, for the price of one device and hour; processes on a host share it."""
        devices = self.num_processes if self.speed.is_card else 1
        return tuple(seconds / 3600 * price * devices for seconds in self.total)  # type: ignore[return-value]


def estimate_run(prepared: Prepared, speed: Speed, num_processes: int) -> Estimate:
    """Add up what a prepared run computes, at a device's speed."""
    plan, settings = prepared.plan, prepared.settings
    model = _Model(prepared, speed, num_processes)
    share = plan.processes.largest_part if plan.processes else 1.0
    per_step = plan.batch_size * plan.batches_per_step
    scale = min(per_step, plan.num_train) / max(prepared.num_sampled, 1)
    objective = prepared.learning.objective
    passes = model.step(prepared.work)
    if objective is not None and prepared.work.num_micro_batches * scale > 1:
        passes = _add(passes, model.forward(prepared.work, prepared.work.num_labels))
    step = _times(passes, scale * share)
    step = _add(step, model.update(prepared.work.num_micro_batches * scale / num_processes))
    reference = (0.0, 0.0)
    if objective is not None and objective.needs_reference:
        reference = _times(
            model.forward(prepared.work, prepared.work.num_labels), plan.num_train / prepared.num_sampled
        )
    unknown = None
    if any((getattr(prepared.shape.config, name, None) or 0) > 1 for name in EXPERTS):
        unknown = "a mixture of experts: how many of its weights a token meets is not estimated"
    if settings.load_in_4bit:
        unknown = "weights in 4 bits: what unpacking them takes is not estimated"
    return Estimate(
        speed=speed,
        step=step,
        num_steps=plan.num_steps,
        validation=_validation(prepared, model, num_processes),
        reference=_times(reference, 1 / min(num_processes, plan.num_train)),
        memory=plan.model_bytes + plan.largest_micro_batch * plan.position_bytes + PROCESS_BYTES,
        num_processes=num_processes,
        flops_a_step=scale * model.step_flops(prepared.work),
        unknown=unknown,
    )


@dataclass(frozen=True, slots=True)
class _Model:
    """Seconds of pieces of work."""

    prepared: Prepared
    speed: Speed
    num_processes: int

    def step_flops(self, work: Work) -> float:
        """Forward and backward."""
        shape, config = self.prepared.shape, self.prepared.shape.config
        again = 2 * shape.num_in_layers if self.prepared.settings.gradient_checkpointing else 0
        per_position = FROZEN_FLOPS * shape.num_in_layers + again + TRAINED_FLOPS * shape.num_trainable
        per_label = FROZEN_FLOPS * shape.widths.vocabulary * shape.widths.hidden
        scores = STEP_SCORES * shape.widths.layers * shape.widths.heads * _head_size(config, shape.widths)
        return per_position * work.num_positions + per_label * work.num_labels + scores * work.num_scores

    def step(self, work: Work) -> Range:
        """Forward and backward of all of `work`, one micro-batch after the other."""
        kept = PASSES_OVER_KEPT * self.prepared.plan.position_bytes * work.num_positions
        return self._seconds(self.step_flops(work), kept, 2 * work.num_micro_batches, 1.0, work.num_micro_batches)

    def forward(self, work: Work, num_labels: int) -> Range:
        """Without a backward."""
        shape = self.prepared.shape
        flops = 2 * (shape.num_in_layers + shape.num_trainable) * work.num_positions
        flops += 2 * shape.widths.vocabulary * shape.widths.hidden * num_labels
        scores = FORWARD_SCORES * shape.widths.layers * shape.widths.heads * _head_size(shape.config, shape.widths)
        kept = self.prepared.plan.position_bytes * work.num_positions
        num = work.num_micro_batches
        return self._seconds(flops + scores * work.num_scores, kept, num, FORWARD_PART, num)

    def decode(self, num_passes: int) -> Range:
        """Passes that compute one token of some answers each."""
        return self._seconds(0.0, 0.0, num_passes, FORWARD_PART, num_passes, reads_weights=True)

    def update(self, num_micro_batches: float) -> Range:
        """What follows the gradients of a step: they are added up over processes, and the optimizer takes them."""
        trained = self.prepared.shape.num_trainable
        seconds = self._seconds(0.0, 4.0 * OPTIMIZER_NUMBERS * trained, 0, 0.0, 0)
        if self.num_processes == 1:
            return seconds
        sent = 2 * 4.0 * trained
        if self.prepared.settings.parallelism_strategy == "fsdp":
            sent += 2 * num_micro_batches * self.prepared.shape.num_in_layers * self.prepared.plan.dtype.itemsize
        low, high = self.speed.exchange
        return _add(seconds, (sent / high, sent / low))

    def _seconds(
        self, flops: float, kept: float, reads: float, part: float, num: float, *, reads_weights: bool = False
    ) -> Range:
        """`reads`: times that all weights are read; `part`: of a step's operations, which `num` times are started."""
        shape, dtype = self.prepared.shape, self.prepared.plan.dtype
        starts = [num * part * OPERATIONS_A_LAYER * shape.widths.layers * start for start in self.speed.start_s]
        # A measured product has read its weights.
        weights = reads * shape.num_in_layers * dtype.itemsize if self.speed.is_card or reads_weights else 0.0
        # Processes on a host share the way to its memory.
        sharing = 1 if self.speed.is_card else self.num_processes
        found = []
        for flop_rate, bandwidth, start in zip(
            reversed(self.speed.flops), reversed(self.speed.bandwidth), starts, strict=True
        ):
            computing = flops / flop_rate + sharing * (kept + weights) / bandwidth
            found.append(max(computing, start) if self.speed.is_card else computing + start)
        return found[0], found[1]


def _validation(prepared: Prepared, model: _Model, num_processes: int) -> Range:
    """All evaluations: the whole set before and after, and a part of it now and then."""
    plan, settings, validation = prepared.plan, prepared.settings, prepared.data.validation
    if validation is None:
        return 0.0, 0.0
    answers = prepared.learning.validation
    rows = validation if answers is None else answers
    num_during = plan.num_steps // settings.val_steps_freq if settings.val_steps_freq else 0
    size = rows.num_rows if plan.eval_max_examples is None else min(plan.eval_max_examples, rows.num_rows)
    times_whole = 2 + num_during * size / max(rows.num_rows, 1)
    chosen = np.unique(np.linspace(0, rows.num_rows - 1, min(rows.num_rows, MOST_LAID_OUT)).astype(np.int64))
    work = measure_work(
        [
            micro_batch
            for part in rows.parts_of(chosen)
            for micro_batch in make_micro_batches(rows, part, batching=plan.batching, max_positions=plan.max_positions)
        ]
    )
    task = prepared.data.task
    labels = work.num_labels * (len(task.labels) if task.kind == "labels" and answers is None else 1)
    seconds = _times(model.forward(work, labels), times_whole * rows.num_rows / len(chosen))
    if task.kind == "answers" and answers is None:
        from trietune.evaluation.evaluate import longest_completion

        generates_during = kind_of(settings.checkpoint_metric).needs_answers
        times = times_whole if generates_during else 2
        passes = math.ceil(times * rows.num_rows / plan.eval_batch_size) * longest_completion(validation)
        # Prompts are computed, and then each token of the longest answer; short ones end sooner.
        low, high = _add(model.decode(passes), model.forward(work, 0))
        seconds = _add(seconds, (0.3 * low, high))
    # A process without an example waits for the others.
    return _times(seconds, 1 / min(num_processes, rows.num_rows))


def threads_here(num_processes: int) -> int:
    """Threads of each of `num_processes` on this machine."""
    import torch

    if num_processes == 1:
        return torch.get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else max((os.cpu_count() or 1) // num_processes, 1)


def _head_size(config: object, widths: object) -> int:
    size = getattr(config, "head_dim", None)
    return int(size) if size else max(int(widths.hidden // widths.heads), 1)  # type: ignore[attr-defined]


def _add(a: Range, b: Range) -> Range:
    return a[0] + b[0], a[1] + b[1]


def _times(a: Range, factor: float) -> Range:
    return a[0] * factor, a[1] * factor
