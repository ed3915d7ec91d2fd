"""The original experiment's loop: rows padded to `max_length`, logits everywhere, model and adapter in one dtype.

As there, frozen weights, adapter and AdamW's moments are all in the model's dtype. Our tokens, since the original's end
without an end-of-sequence token and so with other labels. A batch whose logits would not fit is cut into rows that do,
and their gradients are added.
"""

from __future__ import annotations

from typing import Any

import torch
from job import LEARNING_RATE, WEIGHT_DECAY, Gate, Job
from models import add_lora, build_network, trained_parameters, vocabulary_size

from peers.rows import to_tensors


def train(job: Job, device: torch.device, gate: Gate) -> None:
    model = add_lora(build_network(job.model, device), job.model, adapter_in_fp32=False)
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    workload = job.workload
    at_once = job.rows_at_once(vocabulary_size(job.model))
    model.train()
    gate.open()
    for batch in workload.batches:
        rows = [workload.sequences.row(int(index)) for index in batch]
        num_labels = sum(label >= 0 for _, labels in rows for label in labels[1:])
        total = 0.0
        for first in range(0, len(rows), at_once):
            loss = _summed_loss(model, rows[first : first + at_once], workload.max_length, device) / num_labels
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        gate(total, len(batch))


def _summed_loss(model: Any, rows: list[tuple[list[int], list[int]]], width: int, device: torch.device) -> torch.Tensor:
    tensors = to_tensors(rows, width, device)
    logits = model(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"], use_cache=False).logits
    predictions, labels = logits[:, :-1].float(), tensors["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(predictions.flatten(0, 1), labels.flatten(), reduction="sum")
