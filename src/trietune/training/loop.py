"""The training loop: batches in, finished steps out.

    for each step:  its batches -> micro-batches -> one divisor -> forward, backward each -> clip -> optimizer -> Step

What a step computes follows from its number, so it is laid out one step ahead, in a thread of its own, and again when
memory has run out and smaller micro-batches are asked for.

The divisor of a step is the number of its labels over all micro-batches and batches that it accumulates, known before
the first forward. So the loss is the mean over label tokens of one large padded batch, however the step is cut.

Whoever iterates decides what a finished step means: log it, evaluate, save, stop. No file, bar or signal here.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from trietune.device.cpu import describe_cpu
from trietune.device.device import Device
from trietune.model.causal_lm import TrieModel
from trietune.training.gradients import MicroBatchTooLargeError
from trietune.training.loss_scale import LossScale
from trietune.training.objectives.learning import Learn, Work
from trietune.training.objectives.sft import learn_labels
from trietune.training.optimizer import Schedule, make_state
from trietune.training.prefetch import ahead_thread, one_ahead
from trietune.training.readings import Readings
from trietune.training.sampler import Sampler
from trietune.trie import MicroBatch, total_weight


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step that has been taken.

    Attributes:
        number: steps taken so far, this one included; the first is 1.
        epoch: passes over the data so far, as a fraction.
        loss: mean `-log p` over the labels of the step, before the update; None where it was not read.
        learning_rate: of this update.
        grad_norm: length of the gradient before clipping; None where it was not read.
        sequence_indices: the step's examples (rows of the data), in the order drawn.
        num_labels: label tokens, repeated ones counted each time.
        num_tokens: positions of plain rows without padding.
        num_positions: positions computed: distinct tokens on a trie.
        num_micro_batches: forward and backward passes.
        metrics: what else the objective tells of the step, by the names that TRL gives them: `rewards/margins`.
    """

    number: int
    epoch: float
    loss: float | None
    learning_rate: float
    grad_norm: float | None
    sequence_indices: np.ndarray
    num_labels: int
    num_tokens: int
    num_positions: int
    num_micro_batches: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Schedules:
    """What a run's steps are: how many, from where, and with which learning rate.

    Attributes:
        num_steps: steps of the whole run.
        first_step: steps already taken (0 unless resumed).
        batches_per_step: batches that one optimizer step accumulates.
        learning_rate: of step `n`, counted from 0.
    """

    num_steps: int
    first_step: int
    batches_per_step: int
    learning_rate: Schedule


def train(
    model: TrieModel,
    optimizer: torch.optim.Optimizer,
    sampler: Sampler,
    schedules: Schedules,
    make_micro_batches: Callable[[np.ndarray], Sequence[MicroBatch]],
    *,
    seed: int,
    max_grad_norm: float | None = None,
    before_update: Callable[[int], None] | None = None,
    cut_smaller: Callable[[MicroBatchTooLargeError], None] | None = None,
    device: Device | None = None,
    loss_scale: LossScale | None = None,
    is_read: Callable[[int], bool] = lambda number: True,
    learn: Learn = learn_labels,
) -> Generator[Step, None, None]:
    """Take the steps `schedules.first_step + 1 .. num_steps`, yielding each.

    Args:
        make_micro_batches: cuts the sequences of one batch into micro-batches; called in another thread.
        seed: of dropout, which is drawn anew from (seed, step) at each step, so that no random state outlives a step.
        max_grad_norm: longer gradients are shortened to this length.
        before_update: called with the step's number when all gradients are there, before the optimizer uses them.
        cut_smaller: told of a micro-batch that did not fit; from then on `make_micro_batches` cuts smaller ones, and
            the step is taken again from its beginning. Its result is the same up to rounding, but with dropout, whose
            draws follow the cut.
        device: that the model is on; None for one that runs each operation when it is called.
        loss_scale: for a base model in fp16. A step whose gradients it made infinite is taken again, with half of it.
        is_read: on a device that does not read every step, whether step `number` (from 1) is read.
        learn: what is learnt from a step's micro-batches (`trietune.training.objectives`).

    Raises:
        LossNotFiniteError: before the optimizer would have used such a gradient; at the next step that is read where
            not all are.
        MicroBatchTooLargeError: without `cut_smaller`; with it, whatever it raises.
    """
    device = device or describe_cpu()
    taker = _StepTaker(
        model, optimizer, schedules, device, seed, max_grad_norm, before_update, loss_scale, is_read, learn
    )
    if device.has_static_shapes:
        make_state(optimizer)
        device.end_step()

    def lay_out(number: int) -> _StepLayout:
        return _lay_out(number, sampler, schedules, make_micro_batches)

    number = schedules.first_step
    with ahead_thread() as thread:
        while number < schedules.num_steps:
            with closing(one_ahead(lay_out, range(number, schedules.num_steps), thread)) as layouts:
                for layout in layouts:
                    try:
                        step = taker.take(layout)
                    except MicroBatchTooLargeError as error:
                        optimizer.zero_grad(set_to_none=True)
                        if cut_smaller is None:
                            raise
                        cut_smaller(error)
                        break
                    number += 1
                    yield step


@dataclass(frozen=True, slots=True)
class _StepLayout:
    """What step `number` (from 0) computes; `epoch` as in `Step`."""

    number: int
    epoch: float
    sequence_indices: np.ndarray
    micro_batches: list[MicroBatch]


def _lay_out(
    number: int,
    sampler: Sampler,
    schedules: Schedules,
    make_micro_batches: Callable[[np.ndarray], Sequence[MicroBatch]],
) -> _StepLayout:
    steps_per_epoch = -(-sampler.batches_per_epoch // schedules.batches_per_step)
    epoch, step_in_epoch = divmod(number, steps_per_epoch)
    first_batch = step_in_epoch * schedules.batches_per_step
    last_batch = min(first_batch + schedules.batches_per_step, sampler.batches_per_epoch)
    batches = [sampler.batch(epoch, b) for b in range(first_batch, last_batch)]
    return _StepLayout(
        number,
        epoch + (step_in_epoch + 1) / steps_per_epoch,
        np.concatenate(batches),
        [micro_batch for batch in batches for micro_batch in make_micro_batches(batch)],
    )


@dataclass(frozen=True, slots=True)
class _StepTaker:
    """What all steps of a run have in common."""

    model: TrieModel
    optimizer: torch.optim.Optimizer
    schedules: Schedules
    device: Device
    seed: int
    max_grad_norm: float | None
    before_update: Callable[[int], None] | None
    loss_scale: LossScale | None
    is_read: Callable[[int], bool]
    learn: Learn
    readings: Readings = field(default_factory=Readings)

    def take(self, layout: _StepLayout) -> Step:
        """Gradients, update, and what there is to say of them."""
        number, device, optimizer = layout.number, self.device, self.optimizer
        learning_rate = self.schedules.learning_rate(number)
        for group in optimizer.param_groups:
            group["lr"] = device.learning_rate(learning_rate)
        self.model.network.train()
        loss_there, norm_there, metrics = self._gradients(layout)
        while self.loss_scale is not None and self.loss_scale.has_overflowed(loss_there, norm_there):
            self.loss_scale.update(optimizer)
            optimizer.zero_grad(set_to_none=True)
            loss_there, norm_there, metrics = self._gradients(layout)
        self.readings.note(number + 1, loss_there, norm_there, layout.sequence_indices)
        loss = grad_norm = None
        if device.reads_every_step:
            loss, grad_norm = self.readings.read()
        if self.before_update is not None:
            self.before_update(number + 1)
        if self.loss_scale is None:
            optimizer.step()
        else:
            self.loss_scale.update(optimizer)
        # Where steps are programs, gradients stay the same tensors: made anew, they would be another program.
        optimizer.zero_grad(set_to_none=not device.has_static_shapes)
        device.end_step()
        if not device.reads_every_step and self.is_read(number + 1):
            loss, grad_norm = self.readings.read()
        return Step(
            number=number + 1,
            epoch=layout.epoch,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            sequence_indices=layout.sequence_indices,
            num_labels=int(total_weight(layout.micro_batches)),
            num_tokens=sum(micro_batch.num_tokens for micro_batch in layout.micro_batches),
            num_positions=sum(micro_batch.num_positions for micro_batch in layout.micro_batches),
            num_micro_batches=len(layout.micro_batches),
            metrics=metrics,
        )

    def _gradients(self, layout: _StepLayout) -> tuple[Tensor, Tensor, Mapping[str, float]]:
        """Loss and gradient norm, still on the device, and metrics; the clipped gradients are with the parameters."""

        def seed() -> None:
            self.device.seed(step_seed(self.seed, layout.number))

        seed()
        work = Work(layout.sequence_indices, layout.micro_batches, self.device, seed, self.loss_scale)
        learnt = self.learn(self.model, work)
        if self.loss_scale is not None:
            self.loss_scale.divide_gradients(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return learnt.loss, _clip(parameters, self.max_grad_norm), learnt.metrics


def _clip(parameters: Sequence[nn.Parameter], max_grad_norm: float | None) -> Tensor:
    """The gradients' length, before they are shortened to `max_grad_norm`."""
    if max_grad_norm is not None:
        return nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def step_seed(seed: int, number: int) -> int:
    """A seed for what is random within step `number` (from 0)."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))
