"""Memory runs out in a micro-batch: the step is taken again with smaller ones, and the adapter is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slow_cases import slow_but
from strategies import question_batch
from trietune.model.causal_lm import TrieModel
from trietune.training.loop import MicroBatchTooLargeError, Step, StepRange, training_steps
from trietune.training.sampler import Sampler
from trietune.trie import MicroBatch, make_micro_batches

# PEFT 0.21 asks transformers 5.23 by a name that the latter has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# Of the adapter's weights, after steps of AdamW, which makes rounding errors of small gradients visible.
SAME = 1e-5
VOCABULARY = 120
HOST = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
ERRORS: dict[str, Callable[[], Exception]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "host": lambda: RuntimeError(f"{HOST} 34359738368 bytes. Error code 12 (Cannot allocate memory)"),
    "numpy": lambda: MemoryError("Unable to allocate 32.0 GiB for an array"),
}
SEQUENCES = question_batch(np.random.default_rng(5), vocabulary=VOCABULARY, paragraphs=9)
BATCH_SIZE = 16


class NarrowModel(TrieModel):
    """Has no room for more than `room` positions, which it notices in the forward or only in the backward pass."""

    def __init__(self, room: int, error: Callable[[], Exception], where: str = "forward") -> None:
        super().__init__(make_network(), device=torch.device("cpu"))
        self.room, self.error, self.where = room, error, where
        self.num_failed = 0

    def label_losses(self, micro_batch: MicroBatch) -> Tensor:
        losses = super().label_losses(micro_batch)
        if micro_batch.num_positions <= self.room:
            return losses
        if self.where == "forward":
            self.fail()
        losses.register_hook(lambda _: self.fail())
        return losses

    def fail(self) -> None:
        self.num_failed += 1
        raise self.error()


def make_network() -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    adapted = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))  # type: ignore[arg-type]
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.get_base_model()


class Bound:
    """What a run does when memory runs out: half as much at once."""

    def __init__(self, max_positions: int) -> None:
        self.max_positions = max_positions
        self.failures: list[tuple[int, int]] = []

    def cut(self, indices: np.ndarray) -> list[MicroBatch]:
        return make_micro_batches(SEQUENCES, indices, batching="trie", max_positions=self.max_positions)

    def halve(self, error: MicroBatchTooLargeError) -> None:
        self.failures.append((error.num_positions, error.longest))
        self.max_positions = error.num_positions // 2


def take_steps(model: TrieModel, bound: Bound, num_steps: int = 4, **options: Any) -> list[Step]:
    parameters = [p for p in model.network.parameters() if p.requires_grad]
    return list(
        training_steps(
            model,
            torch.optim.AdamW(parameters, lr=1e-3),
            Sampler(len(SEQUENCES), batch_size=BATCH_SIZE, seed=2),
            StepRange(num_steps, 0, 1, lambda step: 1e-3),
            bound.cut,
            seed=1,
            **options,
        )
    )


def adapter_of(model: TrieModel) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.network.parameters() if p.requires_grad])


def difference(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def undisturbed() -> tuple[Tensor, list[float]]:
    model = NarrowModel(10**6, ERRORS["numpy"])
    steps = take_steps(model, Bound(10**6))
    assert model.num_failed == 0
    return adapter_of(model), [step.loss for step in steps]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("kind", slow_but(ERRORS, "numpy"))
def test_the_adapter_is_that_of_a_run_with_room(kind: str, where: str, undisturbed: tuple[Tensor, list[float]]) -> None:
    model, bound = NarrowModel(60, ERRORS[kind], where), Bound(10**6)
    steps = take_steps(model, bound, cut_smaller=bound.halve)
    assert model.num_failed == len(bound.failures) >= 1
    assert [step.number for step in steps] == [1, 2, 3, 4]
    assert all(step.num_micro_batches > 1 for step in steps)
    np.testing.assert_allclose([step.loss for step in steps], undisturbed[1], rtol=SAME)
    assert difference(adapter_of(model), undisturbed[0]) < SAME


def test_gradients_of_micro_batches_that_did_fit_are_not_added_twice(undisturbed: tuple[Tensor, list[float]]) -> None:
    sizes = [
        part.num_positions for part in Bound(90).cut(Sampler(len(SEQUENCES), batch_size=BATCH_SIZE, seed=2).batch(0, 0))
    ]
    assert sizes[0] < max(sizes), "a part that fits must come before one that does not"
    model, bound = NarrowModel(max(sizes) - 1, ERRORS["host"], "backward"), Bound(90)
    take_steps(model, bound, cut_smaller=bound.halve)
    assert model.num_failed >= 1
    assert difference(adapter_of(model), undisturbed[0]) < SAME


def test_the_bound_stays_low_for_the_rest_of_the_run() -> None:
    model, bound = NarrowModel(60, ERRORS["cuda"]), Bound(10**6)
    take_steps(model, bound, num_steps=8, cut_smaller=bound.halve)
    assert [size for size, _ in bound.failures] == sorted({size for size, _ in bound.failures}, reverse=True)
    assert bound.max_positions <= 60


def test_the_one_who_halves_is_told_how_far_it_can_go() -> None:
    model = NarrowModel(10, ERRORS["host"])
    [index] = np.flatnonzero(np.diff(SEQUENCES.offsets) == np.diff(SEQUENCES.offsets).max())[:1]
    bound = Bound(10**6)
    bound.cut = lambda indices: make_micro_batches(SEQUENCES, np.array([index]), batching="trie", max_positions=99)  # type: ignore[method-assign]

    def give_up(error: MicroBatchTooLargeError) -> None:
        assert error.num_positions == error.longest
        raise KeyError

    with pytest.raises(KeyError):
        take_steps(model, bound, cut_smaller=give_up)
    assert all(p.grad is None for p in model.network.parameters())


def test_another_error_passes_through() -> None:
    model, bound = NarrowModel(60, lambda: RuntimeError("shapes do not match")), Bound(10**6)
    with pytest.raises(RuntimeError, match="shapes"):
        take_steps(model, bound, cut_smaller=bound.halve)
    assert bound.failures == []


@pytest.mark.slow
def test_real_allocations_that_fail_under_a_limit_of_the_system() -> None:
    """In a process whose address space is limited once it has trained a step; see `starve.py`."""
    tests = Path(__file__).parents[1]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    environ["PYTHONPATH"] = os.pathsep.join([str(tests.parent / "src"), str(tests)])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("starve.py"))], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failures"], "nothing failed: the limit was too wide"
    assert found["errors"], "no allocator was heard to fail"
    assert all("allocate" in error for error in found["errors"])
    assert found["num_micro_batches"] == [1, 2]
    assert found["difference"] < SAME, found
