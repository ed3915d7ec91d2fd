"""Micro-batches padded to static shapes, alone or side by side, give the gradients of one row an example."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.families import FAMILIES
from parity.test_gradients import FP64_TOLERANCE, build, gradients, one_row_an_example, relative_error
from strategies import question_batch
from trietune.model.causal_lm import TrieModel
from trietune.trie import make_micro_batches, total_weight
from trietune.trie.static_shapes import choose_shapes


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_static_shapes(family: str, num_rows: int) -> None:
    batch = question_batch(np.random.default_rng(3), vocabulary=120)
    network = build(family, torch.float64)
    expected_loss, expected = one_row_an_example(network, batch)
    micro_batches = make_micro_batches(batch, np.arange(len(batch)), batching="trie", max_positions=70)
    shapes = choose_shapes(
        [(mb.num_positions, len(mb.labels)) for mb in micro_batches], longest=1, deepest=60, num_rows=num_rows
    )
    model = TrieModel(network, device=torch.device("cpu"), attention="mask", shapes=shapes)
    arranged = model.pad_to_shapes(micro_batches)
    assert {mb.input_ids.shape for mb in arranged} <= {(num_rows, s.num_positions) for s in shapes.shapes}
    network.zero_grad()
    divisor, loss = total_weight(micro_batches), 0.0
    for micro_batch in arranged:
        part = torch.dot(model.label_losses(micro_batch), torch.from_numpy(micro_batch.label_weight)) / divisor
        part.backward()
        loss += part.item()
    assert loss == pytest.approx(expected_loss, rel=FP64_TOLERANCE)
    error = relative_error(gradients(network), expected)
    assert error < FP64_TOLERANCE, f"relative error {error:.1e}"
