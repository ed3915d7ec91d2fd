"""The tiny models are what the other tests take them for."""

from __future__ import annotations

import pytest
import torch

from model.families import FAMILIES, VOCAB_SIZE, in_double

# fp32 sums of a few hundred terms, through up to four layers; logits are of order one.
FLOAT32_TOLERANCE = 2e-4


def _tokens(batch: int = 3, length: int = 14) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_attention_in_double_agrees_with_the_library(family: str) -> None:
    tokens = _tokens()
    network = FAMILIES[family]()
    network.set_attn_implementation("eager")
    with torch.no_grad():
        by_library = network(tokens).logits
        by_reference = in_double(FAMILIES[family]())(tokens).logits
    assert by_reference.dtype == torch.float64
    difference = (by_library.double() - by_reference).abs().max().item()
    assert difference < FLOAT32_TOLERANCE, f"largest difference {difference:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_two_calls_give_the_same_weights_whatever_the_global_seed(family: str) -> None:
    torch.manual_seed(1)
    first = FAMILIES[family]().state_dict()
    torch.manual_seed(2)
    second = FAMILIES[family]().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen2", "mistral"])
def test_the_window_matters(family: str) -> None:
    tokens = _tokens()
    network = in_double(FAMILIES[family]())
    with torch.no_grad():
        with_window = network(tokens).logits
        network.config.sliding_window = 100
        without = network(tokens).logits
    assert (with_window[:, -1] - without[:, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_far_from_uniform(family: str) -> None:
    """So that attending one token too many, or too few, is a difference that no tolerance hides."""
    network = in_double(FAMILIES[family]())
    with torch.no_grad():
        attentions = network(_tokens(), output_attentions=True).attentions
    sharpest = torch.stack([weights[:, :, -1].amax(-1).mean() for weights in attentions])
    assert sharpest.max() > 0.2, sharpest  # uniform over 14 tokens would be 0.07
