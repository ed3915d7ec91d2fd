"""`examples/minimal_loop.py`: padding to the longest row of a batch, logits at every position, PEFT's fp32 adapter.

A batch whose logits would not fit is cut into parts, each weighted by its labels.
"""

from __future__ import annotations

from typing import Any

import minimal_loop
import torch
from job import LEARNING_RATE, Gate, Job
from models import add_lora, build_network, vocabulary_size

Row = tuple[list[int], list[int]]


def train(job: Job, device: torch.device, gate: Gate) -> None:
    workload = job.workload
    at_once = job.rows_at_once(vocabulary_size(job.model))
    model = add_lora(build_network(job.model, device), job.model)
    optimizer = minimal_loop.make_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    model.train()
    gate.open()
    for batch in workload.batches:
        rows = [workload.sequences.row(int(index)) for index in batch]
        if at_once >= len(rows):
            loss = minimal_loop.train_step(model, optimizer, rows)
        else:
            loss = step_in_parts(model, optimizer, rows, at_once)
        gate(loss, len(batch))


def step_in_parts(model: Any, optimizer: torch.optim.Optimizer, rows: list[Row], at_once: int) -> float:
    total = 0.0
    for first in range(0, len(rows), at_once):
        part = rows[first : first + at_once]
        tensors = {name: tensor.to(model.device) for name, tensor in minimal_loop.pad(part).items()}
        loss = minimal_loop.mean_loss(model, tensors) * (count_labels(part) / count_labels(rows))
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total


def count_labels(rows: list[Row]) -> int:
    return sum(label >= 0 for _, labels in rows for label in labels[1:])
