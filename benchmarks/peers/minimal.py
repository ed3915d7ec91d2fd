"""`examples/minimal_loop.py`: padding to the longest row of a batch, logits at every position, PEFT's fp32 adapter."""

from __future__ import annotations

import minimal_loop
import torch
from job import LEARNING_RATE, Gate, Job
from models import add_lora, build_network, vocabulary_size

from peers.rows import rows_at_once


def train(job: Job, device: torch.device, gate: Gate) -> None:
    workload = job.workload
    if rows_at_once(workload.max_length, vocabulary_size(job.model)) < workload.batch_size:
        raise RuntimeError("minimal_loop takes a batch at once, and the logits of this one do not fit")
    model = add_lora(build_network(job.model, device), job.model)
    optimizer = minimal_loop.make_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    model.train()
    gate.open()
    for batch in workload.batches:
        rows = [workload.sequences.row(int(index)) for index in batch]
        gate(minimal_loop.train_step(model, optimizer, rows), len(batch))
