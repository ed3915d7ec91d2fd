"""Frozen weights: blocked copies give the same products, and are left alone when they are no longer the weight."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from trietune.model.fast import frozen_weight
from trietune.model.fast.frozen_weight import FrozenWeight, can_pack, pack_frozen_weights
from trietune.model.fast.linear import FrozenLayer, JoinedLinear, fuse_linears

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build has no oneDNN")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product with a blocked copy."""
    rows: list[int] = []
    product = frozen_weight._product

    def counted(operand: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        rows.append(len(operand))
        return product(operand, packed, bias)

    monkeypatch.setattr(frozen_weight, "_product", counted)
    return rows


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def packed(weight: Tensor) -> FrozenWeight:
    if not can_pack(weight):
        pytest.skip(f"this processor has no blocked products in {weight.dtype}")
    frozen = FrozenWeight(linear(weight))
    frozen.may_pack = True
    return frozen


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_rows", [1, 7, 80, 257])
def test_products_of_both_sides(dtype: torch.dtype, tolerance: float, num_rows: int, products: list[int]) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(48, 36, generator=generator, dtype=torch.float64)
    bias = torch.randn(48, generator=generator, dtype=torch.float64)
    x, grad = (torch.randn(num_rows, n, generator=generator, dtype=torch.float64) for n in (36, 48))
    frozen = packed(weight.to(dtype))
    forward = frozen.forward(x.to(dtype), bias.to(dtype)).double()
    backward = frozen.backward(grad.to(dtype)).double()
    assert products == [num_rows, num_rows]
    assert (forward - (x @ weight.t() + bias)).abs().max() < tolerance * forward.abs().max()
    assert (backward - grad @ weight).abs().max() < tolerance * backward.abs().max()


def test_a_weight_that_was_changed_is_multiplied_as_it_is(products: list[int]) -> None:
    frozen = packed(torch.ones(4, 3))
    assert frozen.forward(torch.ones(2, 3)).tolist() == [[3.0] * 4] * 2
    frozen.weights[0].mul_(2)
    assert frozen.forward(torch.ones(2, 3)).tolist() == [[6.0] * 4] * 2
    assert frozen.backward(torch.ones(2, 4)).tolist() == [[8.0] * 3] * 2
    assert products == [2]


def test_a_weight_that_was_replaced_is_multiplied_as_it_is(products: list[int]) -> None:
    layer = linear(torch.ones(4, 3))
    frozen = FrozenWeight(layer)
    frozen.may_pack = True
    frozen.forward(torch.ones(2, 3))
    layer.weight = nn.Parameter(torch.full((4, 3), 5.0), requires_grad=False)
    assert frozen.forward(torch.ones(2, 3)).tolist() == [[15.0] * 4] * 2
    assert frozen.backward(torch.ones(2, 4)).tolist() == [[20.0] * 3] * 2
    assert products == [2]


def test_a_weight_that_was_replaced_is_not_kept_alive() -> None:
    layer = linear(torch.ones(4, 3))
    frozen = FrozenWeight(layer)
    before = weakref.ref(layer.weight)
    layer.weight = nn.Parameter(torch.zeros(4, 3), requires_grad=False)
    assert before() is None
    assert frozen.forward(torch.ones(1, 3)).tolist() == [[0.0] * 4]


def test_biases_of_joined_and_of_single_layers_are_looked_up() -> None:
    single = nn.Linear(3, 4).requires_grad_(False)
    layer = FrozenLayer.of(single)
    assert layer is not None
    joined = JoinedLinear([layer])
    single.bias = nn.Parameter(torch.full((4,), 2.0), requires_grad=False)
    x = torch.zeros(1, 3)
    assert joined(x).tolist() == [[2.0] * 4]


def test_double_precision_is_not_packed() -> None:
    network = nn.Sequential(nn.Linear(8, 8)).double().requires_grad_(False)
    assert fuse_linears(network) == 1
    network(torch.ones(2, 8, dtype=torch.float64))
    assert pack_frozen_weights(network) == 0


def test_a_processor_without_blocked_products_in_bf16_packs_none(
    monkeypatch: pytest.MonkeyPatch, products: list[int]
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    network = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16).requires_grad_(False)
    fuse_linears(network)
    assert pack_frozen_weights(network) == 0
    network(torch.ones(2, 8, dtype=torch.bfloat16))
    assert products == []


def test_as_many_weights_as_the_bound_allows(products: list[int]) -> None:
    network = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3))).requires_grad_(False)
    fuse_linears(network)
    x = torch.randn(5, 16)
    plain = network(x)
    each = 2 * 16 * 16 * 4
    assert pack_frozen_weights(network, most_bytes=2 * each + 1) == 2 * each
    torch.testing.assert_close(network(x), plain)
    assert products == [5, 5]


def test_gradients_go_through_to_the_input_alone() -> None:
    network = nn.Sequential(nn.Linear(6, 9)).requires_grad_(False)
    x = torch.randn(4, 6, requires_grad=True)
    network(x).square().sum().backward()
    expected = x.grad
    fuse_linears(network)
    pack_frozen_weights(network)
    x.grad = None
    network(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_trained_layers_keep_their_own_code() -> None:
    network = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 2))
    network[0].requires_grad_(False)
    assert fuse_linears(network) == 1
    network(torch.ones(1, 6)).sum().backward()
    assert network[1].weight.grad is not None
