"""The training loop: batches in, finished steps out.

    for each step:  its batches -> micro-batches -> one divisor -> forward, backward each -> clip -> optimizer -> Step

What a step computes follows from its number, so it is laid out one step ahead, in a thread of its own, and again when
memory has run out and smaller micro-batches are asked for.

The divisor of a step is the number of its labels over all micro-batches and batches that it accumulates, known before
the first forward. So the loss is the mean over label tokens of one large padded batch, however the step is cut.

Where several processes share a step (`ranks`), all accumulated batches are dealt together, each process computes its
part, and gradients and numbers are summed before anything looks at them.

Whoever iterates decides what a finished step means: log it, evaluate, save, stop. No file, bar or signal here.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from trietune.device.cpu import describe_cpu
from trietune.device.device import Device
from trietune.model.causal_lm import TrieModel
from trietune.ranks.ranks import ALONE, Ranks
from trietune.training.gradients import MicroBatchTooLargeError, TooLargeElsewhereError
from trietune.training.loss_scale import LossScale
from trietune.training.objectives.learning import Learn, Work
from trietune.training.objectives.sft import learn_labels
from trietune.training.optimizer import make_state
from trietune.training.pending_losses import PendingLosses
from trietune.training.prefetch import ahead_thread, prefetch
from trietune.training.sampler import Sampler
from trietune.training.schedule import Schedule
from trietune.trie import MicroBatch, total_weight
from trietune.trie.dealing import Deal

# Label counts travel with the gradients, in their dtype.
LABEL_ROUNDING = 1e-5


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step that has been taken.

    Attributes:
        number: steps taken so far, this one included; the first is 1.
        epoch: passes over the data so far, as a fraction.
        loss: mean `-log p` over the labels of the step, before the update; None where it was not read.
        learning_rate: rate of this update.
        grad_norm: length of the gradient before clipping; None where it was not read.
        sequence_indices: the step's examples (rows of the data), in the order drawn.
        num_labels: label tokens, repeated ones counted each time.
        num_tokens: positions of plain rows without padding.
        num_positions: positions computed: distinct tokens on a trie.
        num_micro_batches: forward and backward passes, of all processes together, as are positions and tokens.
        deal: how the examples were dealt over processes; None for one process.
        num_stopping: processes that wanted to stop when the step's numbers were added up.
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
    deal: Deal | None = None
    num_stopping: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepRange:
    """What a run's steps are: how many, from where, and with which learning rate.

    Attributes:
        num_steps: steps of the whole run.
        first_step: steps already taken (0 unless resumed).
        batches_per_step: batches that one optimizer step accumulates.
        learning_rate: rate of step `n`, counted from 0.
    """

    num_steps: int
    first_step: int
    batches_per_step: int
    learning_rate: Schedule


def training_steps(
    model: TrieModel,
    optimizer: torch.optim.Optimizer,
    sampler: Sampler,
    step_range: StepRange,
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
    ranks: Ranks = ALONE,
    deal: Callable[[np.ndarray], Deal] | None = None,
    make_part: Callable[[np.ndarray], Sequence[MicroBatch]] | None = None,
    wants_stop: Callable[[], bool] = lambda: False,
) -> Generator[Step, None, None]:
    """Take the steps `step_range.first_step + 1 .. num_steps`, yielding each.

    Args:
        make_micro_batches: cuts the sequences of one batch into micro-batches; called in another thread.
        seed: seed of dropout, which is drawn from (seed, step) at each step, so that no random state outlives one.
        max_grad_norm: longer gradients are shortened to this length.
        before_update: called with the step's number when all gradients are there, before the optimizer uses them.
        cut_smaller: told of a micro-batch that did not fit; from then on `make_micro_batches` cuts smaller ones, and
            the step is taken again from its beginning. Its result is the same up to rounding, but with dropout, whose
            draws follow the cut.
        device: device that the model is on; None for one that runs each operation when it is called.
        loss_scale: for a base model in fp16. A step whose gradients it made infinite is taken again, with half of it.
        is_read: on a device that does not read every step, whether step `number` (from 1) is read.
        learn: what is learned from a step's micro-batches (`trietune.training.objectives`).
        ranks: the processes that share each step.
        deal: over several processes, who computes which of the sequences of a step's rows; called in another thread.
        make_part: cuts dealt sequences into micro-batches; by default `make_micro_batches`, for rows of one sequence.
        wants_stop: whether this process wants to stop after the step; told to all as `Step.num_stopping`.

    Raises:
        LossNotFiniteError: before the optimizer would have used such a gradient; at the next step that is read where
            not all are.
        MicroBatchTooLargeError: without `cut_smaller`; with it, whatever it raises.
    """
    device = device or describe_cpu()
    stepper = _Stepper(
        model,
        optimizer,
        step_range,
        device,
        seed,
        max_grad_norm,
        before_update,
        loss_scale,
        is_read,
        learn,
        ranks,
        wants_stop,
    )
    if device.has_static_shapes:
        make_state(optimizer)
        device.end_step()

    def lay_out(number: int) -> _StepLayout:
        return _lay_out(number, sampler, step_range, make_micro_batches, ranks, deal, make_part or make_micro_batches)

    number = step_range.first_step
    with ahead_thread() as thread:
        while number < step_range.num_steps:
            with closing(prefetch(lay_out, range(number, step_range.num_steps), thread)) as layouts:
                for layout in layouts:
                    try:
                        step = stepper.step(layout)
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
    """What step `number` (from 0) computes here; `epoch` as in `Step`, `divisor` of the whole step's loss."""

    number: int
    epoch: float
    sequence_indices: np.ndarray
    micro_batches: list[MicroBatch]
    divisor: float
    deal: Deal | None
    filler: MicroBatch | None = None


def _lay_out(
    number: int,
    sampler: Sampler,
    step_range: StepRange,
    make_micro_batches: Callable[[np.ndarray], Sequence[MicroBatch]],
    ranks: Ranks,
    deal: Callable[[np.ndarray], Deal] | None,
    make_part: Callable[[np.ndarray], Sequence[MicroBatch]],
) -> _StepLayout:
    steps_per_epoch = -(-sampler.batches_per_epoch // step_range.batches_per_step)
    epoch, step_in_epoch = divmod(number, steps_per_epoch)
    first_batch = step_in_epoch * step_range.batches_per_step
    last_batch = min(first_batch + step_range.batches_per_step, sampler.batches_per_epoch)
    batches = [sampler.batch(epoch, b) for b in range(first_batch, last_batch)]
    indices = np.concatenate(batches)
    dealt = None if deal is None else deal(indices)
    if dealt is None:
        micro_batches = [micro_batch for batch in batches for micro_batch in make_micro_batches(batch)]
    else:
        micro_batches = [*make_part(ranks.mine(dealt.parts))]
    return _StepLayout(
        number,
        epoch + (step_in_epoch + 1) / steps_per_epoch,
        indices,
        micro_batches,
        total_weight(micro_batches) if dealt is None else dealt.num_labels,
        dealt,
        _weightless(micro_batches, dealt, make_part) if dealt is not None and ranks.has_equal_passes else None,
    )


def _weightless(
    own: Sequence[MicroBatch], dealt: Deal, make_part: Callable[[np.ndarray], Sequence[MicroBatch]]
) -> MicroBatch | None:
    """A micro-batch that counts for nothing, for a process that has fewer of them than others: one of its own, if any.

    None in a step that computes nothing anywhere.
    """
    some = [*own] or [mb for part in dealt.parts if len(part) for mb in make_part(part[:1])]
    return replace(some[0], label_weight=np.zeros_like(some[0].label_weight)) if some else None


@dataclass(frozen=True, slots=True)
class _Sums:
    """What a step counted, over all processes that share it."""

    num_labels: float
    num_tokens: float
    num_positions: float
    num_micro_batches: float
    num_too_large: float
    num_stopping: float


def _agreed(own: list[int] | None, ranks: Ranks) -> MicroBatchTooLargeError:
    """Of the micro-batches that did not fit somewhere, the one that asks for the smallest bound.

    Args:
        own: positions of the one that did not fit here, and of its longest sequence.
    """
    too_large = [size for size in ranks.gather(own) if size is not None]
    # One that cannot be cut comes first: it ends the run.
    positions, longest = min(too_large, key=lambda size: (size[0] > size[1], max(size[0] // 2, size[1])))
    return MicroBatchTooLargeError(positions, longest)


@dataclass(frozen=True, slots=True)
class _Stepper:
    """What all steps of a run have in common."""

    model: TrieModel
    optimizer: torch.optim.Optimizer
    step_range: StepRange
    device: Device
    seed: int
    max_grad_norm: float | None
    before_update: Callable[[int], None] | None
    loss_scale: LossScale | None
    is_read: Callable[[int], bool]
    learn: Learn
    ranks: Ranks
    wants_stop: Callable[[], bool]
    losses: PendingLosses = field(default_factory=PendingLosses)

    def step(self, layout: _StepLayout) -> Step:
        """Gradients, update, and what there is to say of them."""
        number, device, optimizer = layout.number, self.device, self.optimizer
        learning_rate = self.step_range.learning_rate(number)
        for group in optimizer.param_groups:
            group["lr"] = device.learning_rate(learning_rate)
        self.model.network.train()
        self.ranks.at("computing", number + 1)
        loss_on_device, norm_on_device, sums, metrics = self._gradients(layout)
        while self.loss_scale is not None and self.loss_scale.has_overflowed(loss_on_device, norm_on_device):
            self.loss_scale.update(optimizer)
            optimizer.zero_grad(set_to_none=True)
            loss_on_device, norm_on_device, sums, metrics = self._gradients(layout)
        self.losses.add(number + 1, loss_on_device, norm_on_device, layout.sequence_indices)
        loss = grad_norm = None
        if device.reads_every_step:
            loss, grad_norm = self.losses.fetch()
        if self.before_update is not None:
            self.before_update(number + 1)
        if self.loss_scale is None:
            optimizer.step()
        else:
            self.loss_scale.update(optimizer)
        # Where steps are programs, gradients stay the same tensors: made again, they would be another program.
        optimizer.zero_grad(set_to_none=not device.has_static_shapes)
        device.end_step()
        if not device.reads_every_step and self.is_read(number + 1):
            loss, grad_norm = self.losses.fetch()
        return Step(
            number=number + 1,
            epoch=layout.epoch,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            sequence_indices=layout.sequence_indices,
            num_labels=int(layout.divisor),
            num_tokens=round(sums.num_tokens),
            num_positions=round(sums.num_positions),
            num_micro_batches=round(sums.num_micro_batches),
            deal=layout.deal,
            num_stopping=sums.num_stopping,
            metrics=metrics,
        )

    def _gradients(self, layout: _StepLayout) -> tuple[Tensor, Tensor, _Sums, Mapping[str, float]]:
        """Loss and gradient norm, still on the device, counts and metrics; the clipped gradients are with the
        parameters."""
        self._reseed(layout)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        loss, sums, metrics = self._add_up(layout, parameters)
        if self.loss_scale is not None:
            self.loss_scale.divide_gradients(self.optimizer)
        return loss, _clip(parameters, self.max_grad_norm), sums, metrics

    def _reseed(self, layout: _StepLayout) -> None:
        self.device.seed(step_seed(self.seed, layout.number, self.ranks))

    def _add_up(
        self, layout: _StepLayout, parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, _Sums, Mapping[str, float]]:
        """Gradients of the whole step with the parameters; its loss, and counts over all processes.

        A process that ran out of memory takes part all the same: the others wait for its numbers.
        """
        # Two numbers: the error itself would keep frames alive, and with them activations.
        too_large: list[int] | None = None
        metrics: Mapping[str, float] = {}
        num_own = len(layout.micro_batches)
        fillers = self.ranks.level(layout.micro_batches, layout.filler)[num_own:]
        work = Work(
            layout.sequence_indices,
            layout.micro_batches,
            self.device,
            lambda: self._reseed(layout),
            self.loss_scale,
            divisor=None if layout.deal is None else layout.divisor,
            fillers=fillers,
            ranks=self.ranks,
            filler=layout.filler,
        )
        try:
            learnt = self.learn(self.model, work)
            loss, metrics = learnt.loss, learnt.metrics
        except MicroBatchTooLargeError as error:
            # Of one process it is its own affair; with equal passes the others are within a layer that cannot be
            # gathered any more.
            if layout.deal is None or self.ranks.has_equal_passes:
                raise
            too_large = [error.num_positions, error.longest]
            loss = self.model.to_device(torch.zeros(1))[0]
        except TooLargeElsewhereError:
            loss = self.model.to_device(torch.zeros(1))[0]
        counts = (
            total_weight(layout.micro_batches),
            sum(micro_batch.num_tokens for micro_batch in layout.micro_batches),
            sum(micro_batch.num_positions for micro_batch in layout.micro_batches),
            num_own,
            float(too_large is not None),
            float(self.wants_stop()),
        )
        loss, numbers = self.ranks.add_up(parameters, loss, counts)
        sums = _Sums(*numbers)
        if sums.num_too_large:
            raise _agreed(too_large, self.ranks)
        if abs(sums.num_labels - layout.divisor) > LABEL_ROUNDING * layout.divisor:
            raise RuntimeError(f"the processes computed {sums.num_labels} labels of {layout.divisor}")
        return loss, sums, metrics


def _clip(parameters: Sequence[nn.Parameter], max_grad_norm: float | None) -> Tensor:
    """The gradients' length, before they are shortened to `max_grad_norm`."""
    if max_grad_norm is not None:
        return nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def step_seed(seed: int, number: int, ranks: Ranks = ALONE) -> int:
    """A seed for what is random within step `number` (from 0), another one in each process."""
    words = ranks.seed_words([seed, number])
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
