"""Training through XLA gives plain CPU's numbers, and compiles one program for each shape."""

from __future__ import annotations

from typing import Any

import pytest

from trietune.device import choose_device
from xla.small_training import largest_difference, train_small

# fp32 sums in another order, over fifty steps of a model whose loss falls by half.
LOSS_TOLERANCE = 2e-4
ADAPTER_TOLERANCE = 2e-4


def compare(there: Any, here: Any) -> None:
    differences = [abs(a - b) for a, b in zip(there.losses, here.losses, strict=True) if a is not None]
    assert differences
    adapters = largest_difference(there.adapter, here.adapter)
    print(f"largest difference of a loss {max(differences):.1e}, of a weight {adapters:.1e}")
    assert max(differences) < LOSS_TOLERANCE
    assert adapters < ADAPTER_TOLERANCE
    assert here.losses[-1] < 0.8 * here.losses[0]


def test_fifty_steps_are_those_of_the_cpu_and_each_shape_is_compiled_once(device: Any) -> None:
    from torch_xla.debug import metrics

    metrics.clear_counters()
    there = train_small(device, read_every=10)
    fallbacks = {name for name in metrics.counter_names() if name.startswith("aten::")}
    here = train_small(choose_device("cpu", use_tt=False))
    compare(there, here)
    assert [loss is not None for loss in there.losses] == [number % 10 == 0 for number in range(1, 51)]
    # Ten batches are one round over all shapes; from then on nothing is compiled.
    assert len(set(there.compilations[10:])) == 1
    of_steps = there.compilations[-1] - there.compilations[0]
    assert of_steps == len(there.shapes_used) - 1, "the first step's program is in the first count"
    assert fallbacks <= {"aten::_local_scalar_dense"}, "only reading a loss may leave the device"


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen3"])
def test_windows_soft_caps_and_norms_of_heads(device: Any, family: str) -> None:
    options: dict[str, Any] = {"family": family, "num_steps": 12}
    there, here = train_small(device, **options), train_small(choose_device("cpu", use_tt=False), **options)
    differences = [abs(a - b) for a, b in zip(there.losses, here.losses, strict=True)]
    assert max(differences) < LOSS_TOLERANCE


def test_gradient_checkpointing_gives_the_same_numbers(device: Any) -> None:
    plain = train_small(device, num_steps=10)
    again = train_small(device, num_steps=10, gradient_checkpointing=True)
    assert max(abs(a - b) for a, b in zip(plain.losses, again.losses, strict=True)) < LOSS_TOLERANCE
    assert largest_difference(plain.adapter, again.adapter) < ADAPTER_TOLERANCE


def test_several_micro_batches_a_step(device: Any) -> None:
    options: dict[str, Any] = {"num_steps": 20, "max_positions": 64}
    there, here = train_small(device, **options), train_small(choose_device("cpu", use_tt=False), **options)
    differences = [abs(a - b) for a, b in zip(there.losses, here.losses, strict=True)]
    assert max(differences) < LOSS_TOLERANCE
    assert len(set(there.compilations[10:])) == 1
