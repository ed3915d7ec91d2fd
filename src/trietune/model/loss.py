"""Cross-entropy at label positions only.

A batch of 32 SQuAD questions has some 1,300 nodes and 180 labels; with a vocabulary of 256,000 the other logits would
be a fifth of the work and most of the memory.

Letters: N (node, label) pairs, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trietune.device.device import recompute

# Logits kept at once, in elements; more labels than fit are taken in chunks whose logits are computed again in the
# backward. 2 GB in fp32.
MAX_LOGITS = 500_000_000


def label_losses(
    hidden_ND: Float[Tensor, "N D"],
    labels: Int64[Tensor, " N"],
    project: Callable[[Float[Tensor, "n D"]], Float[Tensor, "n V"]],
    vocabulary_size: int,
    recompute: Callable[..., Any] = recompute,
) -> Float[Tensor, " N"]:
    """`-log p(label)` of each pair, in fp32 (fp64 for fp64 hidden states).

    Args:
        hidden_ND: last hidden states, after the final norm, at the predicting positions.
        labels: token to predict.
        project: the model's head, soft-capping included.
        vocabulary_size: V, to bound the memory.
        recompute: runs a function that is computed again in the backward pass.
    """
    chunk = max(1, MAX_LOGITS // vocabulary_size)
    if len(labels) <= chunk:
        return _losses(hidden_ND, labels, project)
    parts = [
        recompute(_losses, hidden_nD, labels_n, project)
        for hidden_nD, labels_n in zip(torch.split(hidden_ND, chunk), torch.split(labels, chunk), strict=True)
    ]
    return torch.cat(parts)


def _losses(hidden_nD: Tensor, labels_n: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    losses: Tensor = CrossEntropy.apply(project(hidden_nD), labels_n)  # type: ignore[no-untyped-call]
    return losses


class CrossEntropy(torch.autograd.Function):
    """`-log softmax(logits)[label]` of each row, in fp32 (fp64 for fp64 logits): logits [n, V], labels [n] -> [n].

    The log-probabilities become the gradient in place, so a row of logits is held twice, not five times. The graph can
    be walked back once.
    """

    @staticmethod
    def forward(context: Any, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
        context.save_for_backward(log_p, labels)
        context.dtype = logits.dtype
        return log_p.gather(1, labels[:, None])[:, 0].neg()

    @staticmethod
    def backward(context: Any, grad_losses: Tensor) -> tuple[Tensor, None]:
        log_p, labels = context.saved_tensors
        p_less_one = log_p.exp_().scatter_add_(1, labels[:, None], log_p.new_full((len(labels), 1), -1.0))
        grad = torch.empty_like(log_p, dtype=context.dtype)
        return torch.mul(p_less_one, grad_losses[:, None], out=grad), None
