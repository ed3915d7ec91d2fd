"""Fused layers give the library's numbers, and only take the place of layers that they have been proven to equal."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from model.families import FAMILIES, with_adapter
from trietune.model.fast.linear import fuse_linears
from trietune.model.fast.norms_and_mlps import fuse_layers

# fp32 sums of a few hundred terms in another order.
TOLERANCE = 1e-5
# fp32, a few roundings.
NORM_TOLERANCE = 1e-6

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def loss_and_gradients(adapted: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    tokens = torch.arange(3, 43).view(2, 20)
    adapted.zero_grad()
    loss = adapted(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_librarys(family: str) -> None:
    plain = with_adapter(family)
    fused = copy.deepcopy(plain)
    assert fuse_linears(fused) > 0
    found = fuse_layers(fused)
    num_layers = fused.config.num_hidden_layers  # type: ignore[union-attr]
    assert found.gated_mlps == num_layers
    assert found.norms >= 2 * num_layers + 1
    loss, expected = loss_and_gradients(plain)
    ours, gradients = loss_and_gradients(fused)
    assert abs(ours - loss) / loss < TOLERANCE
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 10 * TOLERANCE, f"{name}: {error:.1e}"


def test_adapter_switched_off_gives_the_base_model() -> None:
    adapted = with_adapter("llama")
    fuse_linears(adapted)
    fuse_layers(adapted)
    tokens = torch.arange(3, 23).view(1, 20)
    base = FAMILIES["llama"]()
    with torch.no_grad(), adapted.disable_adapter():  # type: ignore[operator]
        off = adapted(input_ids=tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(off, base(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(adapted(input_ids=tokens).logits, off, atol=1e-3)


@pytest.mark.parametrize("changes", [{"lora_dropout": 0.1}, {"use_dora": True}, {"bias": "lora_only"}])
def test_adapters_of_another_kind_keep_pefts_forward(changes: dict[str, object]) -> None:
    adapted = with_adapter("qwen2" if "bias" in changes else "llama", **changes)
    is_partly = "bias" in changes  # layers without a bias are plain
    only_the_head = 1
    assert (fuse_linears(adapted) == only_the_head) is not is_partly
    assert (fuse_layers(adapted).gated_mlps == 0) is not is_partly


def test_a_gated_mlp_without_adapters_is_fused_too() -> None:
    plain = with_adapter("llama", target_modules=["q_proj", "v_proj"])
    fused = copy.deepcopy(plain)
    fuse_linears(fused)
    assert fuse_layers(fused).gated_mlps == fused.config.num_hidden_layers  # type: ignore[union-attr]
    loss, expected = loss_and_gradients(plain)
    ours, gradients = loss_and_gradients(fused)
    assert abs(ours - loss) / loss < TOLERANCE
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_a_norm_with_another_formula_is_left_alone() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8), requires_grad=False)
            self.variance_epsilon = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (1 + x.abs().mean(-1, keepdim=True)) * self.weight

    module = nn.Sequential(OddRMSNorm())
    assert fuse_layers(module).norms == 0


def test_only_adapters_get_gradients_in_bf16() -> None:
    adapted = with_adapter("gemma")
    adapted.to(torch.bfloat16)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    fuse_linears(adapted)
    fuse_layers(adapted)
    _, gradients = loss_and_gradients(adapted)
    assert gradients
    assert all("lora_" in name and g.dtype == torch.float32 for name, g in gradients.items())


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "llama"])
def test_norms_over_bf16_weights_add_their_one_in_fp32(family: str) -> None:
    """1 + weight rounded to bf16 is 2e-3 off, each channel always to the same side."""
    network = FAMILIES[family]().to(torch.bfloat16).requires_grad_(False)  # type: ignore[arg-type]
    plain = copy.deepcopy(network)
    assert fuse_layers(network).norms > 0
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(2))
    rounded = 0
    for (name, ours), theirs in zip(network.named_modules(), plain.modules(), strict=True):
        if "forward" not in vars(ours) or not type(ours).__name__.endswith("RMSNorm"):
            continue
        inputs = x[:, : len(ours.weight)]  # type: ignore[arg-type]
        # The library returns fp32 for fp32: Llama's norms multiply fp32 by bf16, which is a product in fp32 too.
        error = (ours(inputs) - theirs(inputs)).norm() / theirs(inputs).norm()
        assert error < NORM_TOLERANCE, f"{name}: {error:.1e}"
        weight: torch.Tensor = theirs.weight  # type: ignore[assignment]
        rounded += int(not torch.equal((1 + weight).float(), 1 + weight.float()))
    assert rounded > 0  # so a sum in bf16 would have been another number
