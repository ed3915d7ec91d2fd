"""The fastest loop that ordinary parts give: what a careful person would write without sharing prefixes.

    - a batch is sorted by length and cut into micro-batches of similar rows, so hardly anything is padding;
    - a row's last token predicts nothing and is left out;
    - right padding is never seen by a real token under a causal mask, so the library's SDPA runs without any mask;
    - the output head runs at label positions only;
    - the adapter is in the model's dtype, so nothing is cast; AdamW is PyTorch's fused kernel.

The adapter in bf16 is a head start: TrieTune keeps it in fp32, because small updates are lost in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from job import LEARNING_RATE, WEIGHT_DECAY, Gate, Job
from models import add_lora, build_network, trained_parameters

from peers.rows import to_tensors

Row = tuple[list[int], list[int]]

# Tokens in a micro-batch: large enough for efficient products, small enough for the cache; not tuned by measurement.
TOKENS_AT_ONCE = 4096
# All of Gemma's layers keep 3 MB of activations a token.
DEEP_LAYERS, DEEP_TOKENS_AT_ONCE = 9, 1024


def train(job: Job, device: torch.device, gate: Gate) -> None:
    model = add_lora(build_network(job.model, device), job.model, adapter_in_fp32=False)
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    sequences = job.workload.sequences
    is_deep = job.model.name == "gemma" and job.model.layers >= DEEP_LAYERS
    tokens_at_once = DEEP_TOKENS_AT_ONCE if is_deep else TOKENS_AT_ONCE
    model.train()
    gate.open()
    for batch in job.workload.batches:
        rows = [sequences.row(int(index)) for index in batch]
        num_labels = sum(label >= 0 for _, labels in rows for label in labels[1:])
        losses = []
        for part in cut_by_length(rows, tokens_at_once):
            loss = summed_loss(model, part, device) / num_labels
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        gate(float(torch.stack(losses).sum()), len(batch))


def cut_by_length(rows: list[Row], tokens_at_once: int) -> list[list[Row]]:
    """Rows sorted by length, the longest first, in parts whose padded size stays below the bound."""
    rows = sorted(rows, key=lambda row: -len(row[0]))
    parts, first = [], 0
    while first < len(rows):
        size = max(1, tokens_at_once // len(rows[first][0]))
        parts.append(rows[first : first + size])
        first += size
    return parts


def summed_loss(model: Any, rows: list[Row], device: torch.device) -> torch.Tensor:
    network = model.get_base_model()
    tensors = to_tensors(rows, max(len(ids) for ids, _ in rows), device)
    labels = tensors["labels"][:, 1:]
    hidden = network.get_decoder()(input_ids=tensors["input_ids"][:, :-1], use_cache=False).last_hidden_state
    is_label = labels != -100
    logits = network.get_output_embeddings()(hidden[is_label]).float()
    return torch.nn.functional.cross_entropy(logits, labels[is_label], reduction="sum")
