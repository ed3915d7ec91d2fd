"""TrieTune's own loop with what `trietune train` builds, on the benchmark's batches.

trietune            one trie a batch
trietune-packed     the same code without sharing: every example is its own branch
trietune-padded     padded rows and the library's attention
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from job import LEARNING_RATE, WEIGHT_DECAY, Gate, Job
from models import add_lora, build_network, trained_parameters

from trietune.device import choose_device
from trietune.model.assemble import assemble
from trietune.training.loop import Schedules
from trietune.training.loop import train as train_steps
from trietune.training.optimizer import build_optimizer
from trietune.trie import make_micro_batches

# Positions in a micro-batch; every batch of the benchmark is one trie.
MAX_NODES = 16_384
MAX_PADDED = 8192


@dataclass(frozen=True, slots=True)
class GivenBatches:
    """Stands in for the sampler: the benchmark's batches, in order."""

    batches: list[np.ndarray]

    @property
    def batches_per_epoch(self) -> int:
        return len(self.batches)

    def batch(self, epoch: int, number: int) -> np.ndarray:
        return self.batches[number]


def train(job: Job, device: torch.device, gate: Gate) -> None:
    batching = {"trietune": "trie", "trietune-packed": "packed", "trietune-padded": "padded"}[job.engine]
    network = add_lora(build_network(job.model, device), job.model).get_base_model()
    place = choose_device(device.type, use_tt=False)
    model = assemble(
        network,
        place,
        attention=None if batching == "padded" else place.attentions[0],  # type: ignore[arg-type]
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
    steps = train_steps(
        model,
        optimizer,
        GivenBatches(workload.batches),  # type: ignore[arg-type]
        Schedules(len(workload.batches), 0, 1, lambda step: LEARNING_RATE),
        lambda batch: make_micro_batches(
            workload.sequences,
            batch,
            batching=batching,  # type: ignore[arg-type]
            max_nodes=MAX_PADDED if batching == "padded" else MAX_NODES,
        ),
        seed=1,
        device=place,
    )
    gate.open()
    for step in steps:
        gate(step.loss, len(step.sequence_indices))
