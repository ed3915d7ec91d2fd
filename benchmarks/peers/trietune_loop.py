"""TrieTune's own loop with what `trietune train` builds, on the benchmark's batches.

trietune            one trie a batch
trietune-packed     the same code without sharing: every example is its own branch
trietune-padded     padded rows and the library's attention
trietune-WAY        as trietune, with that `attention` instead of the one that a plan would take
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from job import LEARNING_RATE, WEIGHT_DECAY, Gate, Job
from models import add_lora, build_network, trained_parameters

from trietune.device import Device, choose_device
from trietune.device.device import AttentionNeeds
from trietune.device.kernels import choose_backend
from trietune.model.assemble import assemble
from trietune.training.loop import StepRange, training_steps
from trietune.training.optimizer import build_optimizer
from trietune.trie import make_micro_batches

# Positions in a micro-batch; every batch of the benchmark is one trie.
MAX_NODES = 16_384
MAX_PADDED = 8192
WAYS = ("varlen", "flex", "mask", "rows")


@dataclass(frozen=True, slots=True)
class GivenBatches:
    """Stands in for the sampler: the benchmark's batches, in order."""

    batches: list[np.ndarray]

    @property
    def batches_per_epoch(self) -> int:
        return len(self.batches)

    def batch(self, epoch: int, number: int) -> np.ndarray:
        return self.batches[number]


def way_to_attend(job: Job, config: Any, device: Device) -> str:
    """What a plan would take, or the way that the engine is named after."""
    needs = AttentionNeeds(
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        dtype=getattr(torch, job.model.dtype),
        has_soft_cap=False,
        num_positions=MAX_NODES,
    )
    asked = job.engine.removeprefix("trietune").removeprefix("-")
    return choose_backend(asked if asked in WAYS else "auto", device, needs, where=job.engine)[0]


def train(job: Job, device: torch.device, gate: Gate) -> None:
    batching = {"trietune-packed": "packed", "trietune-padded": "padded"}.get(job.engine, "trie")
    network = add_lora(build_network(job.model, device), job.model).get_base_model()
    place = choose_device(device.type, use_tt=False)
    model = assemble(
        network,
        place,
        attention=None if batching == "padded" else way_to_attend(job, network.config, place),  # type: ignore[arg-type]
        fused_layers=True,
        pack_weights="auto",
    )
    optimizer = build_optimizer(
        "adamw",
        trained_parameters(network),
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        device=place,
    )
    workload = job.workload
    steps = training_steps(
        model,
        optimizer,
        GivenBatches(workload.batches),  # type: ignore[arg-type]
        StepRange(len(workload.batches), 0, 1, lambda step: LEARNING_RATE),
        lambda batch: make_micro_batches(
            workload.sequences,
            batch,
            batching=batching,  # type: ignore[arg-type]
            max_positions=MAX_PADDED if batching == "padded" else MAX_NODES,
        ),
        seed=1,
        device=place,
    )
    gate.open()
    for step in steps:
        gate(step.loss, len(step.sequence_indices))
