"""The same small training on any device: batches with shared beginnings, a schedule, a few shapes.

python tests/xla/small_training.py data|tensor NUM_DEVICES      on a mesh, in a process of its own; prints JSON
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

NUM_SHAPES = 3
PEAK = 1e-2


def start(**options: Any) -> Any:
    """XLA's CPU client with the plug-in's habit switched on."""
    from trietune.device import choose_device
    from trietune.device.options import DeviceOptions

    device = choose_device("xla", use_tt=True, options=DeviceOptions(**options))
    import torch_xla

    torch_xla._XLAC._set_xla_all_numbers_special_scalars(True)
    return device


@dataclass(frozen=True)
class Trained:
    """What a training left: its losses (None where not read), adapter, and compilations after each step."""

    losses: list[float | None]
    adapter: dict[str, np.ndarray]
    compilations: list[int]
    shapes: Any
    shapes_used: set[tuple[int, ...]]
    optimizer: Any
    peft_model: Any


def sequences_of(num_batches: int) -> Any:
    """Paragraphs with questions, 2 to 4 of them, one batch after the other; and where each batch begins."""
    from strategies import flat, question_batch

    batches = [
        question_batch(np.random.default_rng(i), vocabulary=120, paragraphs=2 + i % 3) for i in range(num_batches)
    ]
    tokens, labels, bounds = [], [], [0]
    for batch in batches:
        for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
            tokens.append(batch.input_ids[a:b].tolist())
            labels.append(batch.labels[a:b].tolist())
        bounds.append(len(tokens))
    return flat(tokens, labels), bounds


@dataclass(frozen=True)
class GivenBatches:
    """Stands in for the sampler: the same ten batches, again and again."""

    bounds: list[int]

    @property
    def batches_per_epoch(self) -> int:
        return len(self.bounds) - 1

    def batch(self, epoch: int, number: int) -> np.ndarray:
        return np.arange(self.bounds[number], self.bounds[number + 1])


def train_small(
    device: Any,
    *,
    family: str = "gemma",
    num_steps: int = 50,
    read_every: int = 1,
    gradient_checkpointing: bool = False,
    max_positions: int = 10**6,
    max_grad_norm: float | None = 1.0,
    is_static: bool | None = None,
) -> Trained:
    """Train a tiny model with a linear schedule; on devices of static shapes, and where `is_static`, in such."""
    import torch

    from model.families import FAMILIES
    from trietune.model.adapter.adapter import adapter_tensors, add_adapter
    from trietune.model.assemble import assemble
    from trietune.model.base.folder import ModelFolder
    from trietune.training.loop import StepRange, training_steps
    from trietune.training.optimizer import build_optimizer
    from trietune.training.schedule import learning_rate_schedule
    from trietune.trie import make_micro_batches
    from trietune.trie.static_shapes import choose_shapes

    sequences, bounds = sequences_of(10)
    sampler = GivenBatches(bounds)
    cut = partial(make_micro_batches, sequences, batching="trie", max_positions=max_positions)
    laid_out = [mb for number in range(10) for mb in cut(sampler.batch(0, number))]
    shapes = choose_shapes(
        [(mb.num_positions, len(mb.labels)) for mb in laid_out], longest=1, deepest=60, num_rows=device.num_rows
    )
    torch.manual_seed(7)
    network = FAMILIES[family]()
    peft_model = add_adapter(network, r=4, alpha=8, base=ModelFolder(Path(), "x", "folder"), seed=1)
    has_shapes = device.has_static_shapes if is_static is None else is_static
    model = assemble(
        network,
        device,
        attention="mask" if has_shapes else "rows",
        fused_layers=True,
        shapes=shapes if has_shapes else None,
        gradient_checkpointing=gradient_checkpointing,
    )
    optimizer = build_optimizer(
        "adamw_torch",
        [p for p in network.parameters() if p.requires_grad],
        learning_rate=PEAK,
        weight_decay=0.01,
        device=device,
    )
    schedule = learning_rate_schedule("linear", peak=PEAK, num_steps=num_steps + 10, num_warmup_steps=3)
    used: set[tuple[int, ...]] = set()

    def arranged(indices: np.ndarray) -> Any:
        micro_batches = model.pad_to_shapes(cut(indices))
        used.update((*mb.input_ids.shape, len(mb.labels)) for mb in micro_batches)
        return micro_batches

    steps = training_steps(
        model,
        optimizer,
        sampler,
        StepRange(num_steps, 0, 1, schedule),
        arranged,
        seed=3,
        max_grad_norm=max_grad_norm,
        device=device,
        is_read=lambda number: number % read_every == 0,
    )
    losses, compilations = [], []
    for step in steps:
        losses.append(step.loss)
        compilations.append(device.compilations() or 0)
    adapter = {name: tensor.detach().cpu().numpy() for name, tensor in adapter_tensors(peft_model).items()}
    return Trained(losses, adapter, compilations, shapes, used, optimizer, peft_model)


def largest_difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Of any weight of two adapters."""
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


def on_mesh(kind: str, num_devices: int) -> dict[str, Any]:
    """Train on a mesh of virtual devices and on the plain CPU."""
    from trietune.device import choose_device, read_mesh

    mesh = read_mesh(
        strategy="data_parallel" if kind == "data" else "tensor_parallel",
        shape=(num_devices, 1) if kind == "data" else (1, num_devices),
        axis_names=("data", "model"),
        shardings=None
        if kind == "data"
        else [
            [r"\.(q|gate|up)_proj(\.base_layer)?$", ["model", None]],
            [r"\.(o|down)_proj(\.base_layer)?$", [None, "model"]],
        ],
        data_dimension=None,
        where="test",
    )
    options = {"num_steps": 12, "read_every": 1, "max_positions": 70 if kind == "data" else 10**6}
    there = train_small(start(mesh=mesh), **options)
    here = train_small(choose_device("cpu", use_tt=False), **options)
    pairs = zip(there.losses, here.losses, strict=True)
    return {
        "loss_difference": max(abs(a - b) for a, b in pairs),  # type: ignore[operator]  # all are read
        "adapter_difference": largest_difference(there.adapter, here.adapter),
        "first_loss": here.losses[0],
        "last_loss": here.losses[-1],
        "compilations": there.compilations,
        "num_rows": there.shapes.num_rows,
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(json.dumps(on_mesh(sys.argv[1], int(sys.argv[2]))))
