"""The loss at labels: the library's cross-entropy and its gradient, in one buffer less."""

from __future__ import annotations

import pytest
import torch

from trietune.model import loss as loss_module
from trietune.model.loss import label_losses


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("most_logits", [10**9, 150])
def test_losses_and_gradients_are_the_librarys(
    dtype: torch.dtype, tolerance: float, most_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "MAX_LOGITS", most_logits)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 16, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(50, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 50, (9,), generator=generator)
    weights = torch.rand(9, generator=generator, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(hidden @ head.t(), labels, reduction="none")
    (expected * weights).sum().backward()
    assert hidden.grad is not None

    ours = hidden.detach().to(dtype).requires_grad_()
    losses = label_losses(ours, labels, lambda h: h @ head.to(dtype).t(), 50)
    (losses * weights.to(losses.dtype)).sum().backward()
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert ours.grad is not None
    assert (losses.double() - expected).abs().max() < tolerance * expected.abs().max()
    assert (ours.grad.double() - hidden.grad).abs().max() < tolerance * hidden.grad.abs().max()


def test_a_label_far_below_the_others_has_a_finite_loss() -> None:
    logits = torch.tensor([[0.0, 500.0, -300.0]], requires_grad=True)
    losses = label_losses(logits, torch.tensor([2]), lambda h: h, 3)
    losses.sum().backward()
    assert losses.item() == 800.0
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, 1.0, -1.0]]
