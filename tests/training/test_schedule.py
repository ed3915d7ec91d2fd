"""Learning rates, step by step."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from trietune.training.schedule import learning_rate_schedule


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("num_warmup_steps", [0, 3, 10])
def test_rates_are_those_of_transformers(kind: str, num_warmup_steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=10)
    ours = learning_rate_schedule(kind, peak=0.1, num_steps=10, num_warmup_steps=num_warmup_steps)
    for step in range(10):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()
