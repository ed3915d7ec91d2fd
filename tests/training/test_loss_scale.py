"""Scaled losses give the same training; a scale that is too large costs time, never a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from strategies import question_batch
from training.test_out_of_memory import adapter_of, difference, make_network
from trietune.model.causal_lm import TrieModel
from trietune.training.loop import Step, StepRange, training_steps
from trietune.training.loss_scale import SMALLEST_SCALE, LossScale
from trietune.training.pending_losses import LossNotFiniteError
from trietune.training.sampler import Sampler
from trietune.trie import MicroBatch, make_micro_batches

# PEFT 0.21 asks transformers 5.23 by a name that the latter has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

CPU = torch.device("cpu")
SEQUENCES = question_batch(np.random.default_rng(5), vocabulary=120, paragraphs=9)
# Scales are powers of two, so they change no digit of a gradient in fp32.
SAME = 1e-7


class SixteenBitModel(TrieModel):
    """Gradients of its losses that fp16 cannot hold are infinite, as in a backward in fp16."""

    def __init__(self, largest: float, loss: float | None = None) -> None:
        super().__init__(make_network(), device=CPU)
        self.largest, self.loss = largest, loss
        self.forwards = 0

    def label_losses(self, micro_batch: MicroBatch) -> torch.Tensor:
        self.forwards += 1
        losses = super().label_losses(micro_batch)
        if self.loss is not None:
            losses = losses * self.loss
        losses.register_hook(lambda grad: torch.where(grad.abs() > self.largest, torch.inf, grad))
        return losses


def take_steps(model: TrieModel, loss_scale: LossScale | None, num_steps: int = 4, **options: Any) -> list[Step]:
    parameters = [p for p in model.network.parameters() if p.requires_grad]
    return list(
        training_steps(
            model,
            torch.optim.AdamW(parameters, lr=1e-3),
            Sampler(len(SEQUENCES), batch_size=16, seed=2),
            StepRange(num_steps, 0, 1, lambda step: 1e-3),
            lambda indices: make_micro_batches(SEQUENCES, indices, batching="trie", max_positions=60),
            seed=1,
            max_grad_norm=0.5,
            loss_scale=loss_scale,
            **options,
        )
    )


def test_a_scaled_loss_gives_the_same_training() -> None:
    plain, scaled = TrieModel(make_network(), device=CPU), TrieModel(make_network(), device=CPU)
    expected, found = take_steps(plain, None), take_steps(scaled, LossScale(CPU))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=SAME)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=SAME)
    assert difference(adapter_of(scaled), adapter_of(plain)) < SAME


def test_a_step_that_overflows_is_taken_again_at_half_the_scale() -> None:
    plain = SixteenBitModel(float("inf"))
    expected = take_steps(plain, None)
    model, loss_scale = SixteenBitModel(1000.0), LossScale(CPU)
    seen: list[int] = []
    found = take_steps(model, loss_scale, before_update=seen.append)
    assert [step.number for step in found] == seen == [1, 2, 3, 4]
    assert model.forwards > plain.forwards
    assert difference(adapter_of(model), adapter_of(plain)) < SAME
    assert found[-1].loss == pytest.approx(expected[-1].loss, rel=SAME)
    assert SMALLEST_SCALE < loss_scale.state()["scale"] < LossScale(CPU).state()["scale"]


def test_gradients_that_no_scale_makes_finite_stop_the_run() -> None:
    model = SixteenBitModel(0.0)
    before = adapter_of(model).clone()
    with pytest.raises(LossNotFiniteError) as error:
        take_steps(model, LossScale(CPU))
    assert error.value.number == 1
    assert torch.equal(adapter_of(model), before)


def test_a_loss_that_is_not_finite_stops_the_run_at_once() -> None:
    model, loss_scale = SixteenBitModel(float("inf"), loss=float("nan")), LossScale(CPU)
    with pytest.raises(LossNotFiniteError):
        take_steps(model, loss_scale)
    assert loss_scale.state()["scale"] == LossScale(CPU).state()["scale"]


def test_a_scale_goes_on_from_its_state() -> None:
    loss_scale = LossScale(CPU)
    take_steps(SixteenBitModel(1000.0), loss_scale)
    again = LossScale(CPU, loss_scale.state())
    assert again.state() == loss_scale.state()
    model = SixteenBitModel(1000.0)
    forwards_of_four_steps = SixteenBitModel(float("inf"))
    take_steps(forwards_of_four_steps, None)
    take_steps(model, again)
    assert model.forwards == forwards_of_four_steps.forwards, "it has learned the scale already"
