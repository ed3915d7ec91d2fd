"""Padded rows as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_tensors(
    rows: Sequence[tuple[list[int], list[int]]], width: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Each [rows, width], padded on the right."""
    fields = {
        "input_ids": [ids + [0] * (width - len(ids)) for ids, _ in rows],
        "attention_mask": [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows],
        "labels": [labels + [-100] * (width - len(labels)) for _, labels in rows],
    }
    return {name: torch.tensor(values, device=device) for name, values in fields.items()}
