"""AdamW over one buffer does what PyTorch's does tensor by tensor, and its state can be taken over by the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from trietune.device import choose_device
from trietune.training import flat_adamw
from trietune.training.flat_adamw import FlatAdamW, can_be_flat
from trietune.training.optimizer import build_optimizer
from trietune.training.state import optimizer_tensors, restore_optimizer

SHAPES = [(3, 5), (7,), (2, 2, 2)]
OPTIONS = {"lr": 0.01, "weight_decay": 0.1}


def make_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def take_steps(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range, *, clip: float | None = None
) -> None:
    for step in steps:
        loss = sum(((p - step) ** 3).sum() for p in parameters)
        loss.backward()  # type: ignore[union-attr]
        if clip is not None:
            every = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(every, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}])
def test_steps_are_those_of_pytorchs_adamw(kind: dict[str, bool], clip: float | None) -> None:
    theirs, ours = make_parameters(), make_parameters()
    take_steps(theirs, torch.optim.AdamW(theirs, **OPTIONS, **kind), range(5), clip=clip)  # type: ignore[arg-type]
    take_steps(ours, FlatAdamW(ours, **OPTIONS, **kind), range(5), clip=clip)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-6, atol=1e-6)


def test_parameters_and_gradients_are_views_of_one_buffer_each() -> None:
    parameters = make_parameters()
    optimizer = FlatAdamW(parameters, **OPTIONS)
    [whole] = optimizer.param_groups[0]["params"]
    take_steps(parameters, optimizer, range(2))
    assert {p.untyped_storage().data_ptr() for p in parameters} == {whole.untyped_storage().data_ptr()}
    assert {p.grad.untyped_storage().data_ptr() for p in parameters} == {whole.grad.untyped_storage().data_ptr()}
    assert not whole.grad.any()
    parameters[1].data.fill_(2.0)  # as loading a checkpoint does
    assert whole[15:22].tolist() == [2.0] * 7


Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
FLAT: Make = lambda parameters: FlatAdamW(parameters, **OPTIONS, fused=True)  # noqa: E731
PLAIN: Make = lambda parameters: torch.optim.AdamW(parameters, **OPTIONS, fused=True)  # noqa: E731


@pytest.mark.parametrize(("before", "after"), [(FLAT, FLAT), (FLAT, PLAIN), (PLAIN, FLAT)])
def test_a_state_goes_on_in_either_form(before: Make, after: Make) -> None:
    whole, first = make_parameters(), make_parameters()
    take_steps(whole, before(whole), range(6))
    optimizer = before(first)
    take_steps(first, optimizer, range(3))
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
    assert set(saved) == {f"state.{n}.{key}" for n in range(3) for key in ("step", "exp_avg", "exp_avg_sq")}
    assert [tuple(saved[f"state.{n}.exp_avg"].shape) for n in range(3)] == SHAPES
    resumed = [nn.Parameter(p.detach().clone()) for p in first]
    continued = after(resumed)
    restore_optimizer(continued, saved)
    take_steps(resumed, continued, range(3, 6))
    for one, other in zip(resumed, whole, strict=True):
        if before is after:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-6, atol=1e-6)


def test_a_state_of_another_adapter_is_refused() -> None:
    parameters = make_parameters()
    optimizer = FlatAdamW(parameters, **OPTIONS)
    take_steps(parameters, optimizer, range(1))
    saved = optimizer_tensors(optimizer)
    with pytest.raises(ValueError, match="its parameter"):
        restore_optimizer(FlatAdamW(make_parameters()[::-1], **OPTIONS), saved)
    with pytest.raises(ValueError, match="for 3 parameters, this adapter has 2"):
        restore_optimizer(FlatAdamW(make_parameters()[:2], **OPTIONS), saved)
    with pytest.raises(ValueError, match="different numbers of steps"):
        restore_optimizer(optimizer, {**saved, "state.1.step": torch.tensor(9.0)})


@pytest.mark.parametrize("name", ["adamw", "adamw_torch", "adamw_torch_fused"])
def test_an_adapter_is_flat_and_a_whole_layer_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = choose_device("cpu", use_tt=False)
    built = build_optimizer(name, make_parameters(), learning_rate=1.0, weight_decay=0.0, device=device)
    assert isinstance(built, FlatAdamW)
    monkeypatch.setattr(flat_adamw, "LARGEST", 10)
    assert not can_be_flat(make_parameters())
    built = build_optimizer(name, make_parameters(), learning_rate=1.0, weight_decay=0.0, device=device)
    assert type(built) is torch.optim.AdamW
    assert not can_be_flat([*make_parameters(), nn.Parameter(torch.ones(2, dtype=torch.float64))])
