"""What scans keep is counted, so that `max_tokens_per_micro_batch: auto` knows of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from states.state_families import build
from trietune.device.memory import bytes_per_position, widths_of
from trietune.model.states.memory import STEPS_PER_NODE, bytes_of_scans, with_scans

NUM_POSITIONS = 64


def saved_by(network: torch.nn.Module) -> int:
    """Bytes that a plain row of the first layer's mixer saves, weights left out."""
    mixer = next(m for name, m in network.named_modules() if name.endswith(("layers.0.linear_attn", "layers.0.mamba")))
    weights = {p.untyped_storage().data_ptr() for p in mixer.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    hidden = torch.randn(1, NUM_POSITIONS, 48, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        mixer(hidden_states=hidden)
    return sum(storage.nbytes() for place, storage in storages.items() if place not in weights)


@pytest.mark.parametrize("family", ["qwen3_5_text", "bamba", "jamba"])
def test_a_scan_is_counted_as_it_is_without_memory(family: str) -> None:
    network = build(family)
    counted = bytes_of_scans(network)
    assert [number > 0 for number in counted] == [True, False, True]
    assert counted[0] == pytest.approx(STEPS_PER_NODE * saved_by(network) / NUM_POSITIONS, rel=0.1)


def test_windows_keep_no_more_than_products_do() -> None:
    assert bytes_of_scans(build("lfm2")) == [0, 0, 0]


def test_scans_are_part_of_the_estimate() -> None:
    network = build("qwen3_5_text")
    widths = with_scans(widths_of(network.config, network), network)
    assert widths.scanned == sum(bytes_of_scans(network)) > widths.widest_scan > 0
    without = replace(widths, scanned=0, widest_scan=0)
    for checkpointing in (False, True):
        ours, theirs = (
            bytes_per_position(network.config, torch.float32, widths=w, gradient_checkpointing=checkpointing)
            for w in (widths, without)
        )
        assert ours - theirs >= (widths.widest_scan if checkpointing else widths.scanned)
