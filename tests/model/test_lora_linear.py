"""Linear layers joined into one give what each gives alone, whatever adapters, scales and biases they have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from trietune.model.fast.linear import FrozenLayer, JoinedLinear, fuse_linears

INPUTS, ROWS = 12, 7


class Three(nn.Module):
    """Three layers of one input."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, 10, bias=bias)
        self.second = nn.Linear(INPUTS, 4, bias=False)
        self.third = nn.Linear(INPUTS, 6, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x), self.second(x), self.third(x)], -1)


def adapted_layers(targets: list[str], *, bias: bool, dtype: torch.dtype, **config: object) -> PeftModel:
    torch.manual_seed(0)
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, **config)  # type: ignore[arg-type]
    return get_peft_model(Three(bias=bias).to(dtype), lora).to(dtype)  # type: ignore[return-value, arg-type]


def joined(network: PeftModel) -> JoinedLinear:
    layers = [FrozenLayer.of(getattr(network.base_model.model, name)) for name in ("first", "second", "third")]
    assert all(layer is not None for layer in layers)
    return JoinedLinear(layers)  # type: ignore[arg-type]


def gradients(network: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    x = x.clone().requires_grad_()
    out = forward(x)
    out.backward(torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape))
    assert x.grad is not None
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **found}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("targets", "config"),
    [
        (["first", "second", "third"], {}),
        (["first", "second", "third"], {"alpha_pattern": {"second": 11}, "rank_pattern": {"third": 2}}),
        (["second"], {}),
        (["first", "third"], {"alpha_pattern": {"third": 1}}),
    ],
)
@pytest.mark.parametrize("is_packed", [False, True])
def test_joined_is_each_alone(targets: list[str], config: dict[str, object], bias: bool, is_packed: bool) -> None:
    dtype, tolerance = (torch.float32, 1e-5) if is_packed else (torch.float64, 1e-12)
    network = adapted_layers(targets, bias=bias, dtype=dtype, **config)
    linear = joined(network)
    linear.weight.may_pack = is_packed and torch.backends.mkldnn.is_available()
    x = torch.randn(2, ROWS, INPUTS, dtype=dtype)
    expected, ours = gradients(network, network, x), gradients(network, linear, x)
    assert ours.keys() == expected.keys()
    assert len(ours) == 2 + 2 * len(targets)
    for name, value in ours.items():
        assert value.dtype == expected[name].dtype
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance)


def test_an_updated_adapter_is_the_one_that_is_multiplied() -> None:
    network = adapted_layers(["first", "second"], bias=False, dtype=torch.float64)
    linear = joined(network)
    x = torch.randn(ROWS, INPUTS, dtype=torch.float64)
    linear(x)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(3)  # unseen by version counters, as some optimizers do it
    torch.testing.assert_close(linear(x), network(x))


@pytest.mark.parametrize("change", ["switched off", "merged"])
def test_an_adapter_that_is_not_applied_is_not_active(change: str) -> None:
    network = adapted_layers(["second"], bias=False, dtype=torch.float64)
    linear = joined(network)
    assert linear.is_active()
    network.base_model.disable_adapter_layers() if change == "switched off" else network.merge_adapter()
    assert not linear.is_active()


def test_no_adapter_at_all_still_lets_gradients_through() -> None:
    network = Three(bias=True).requires_grad_(False)
    x = torch.randn(3, INPUTS)
    expected = gradients(network, network, x)
    assert fuse_linears(network) == 3
    ours = gradients(network, network, x)
    assert ours.keys() == {"out", "x"}
    torch.testing.assert_close(ours["x"], expected["x"])
