"""Attention of the rows of a trie: every bucket gathered, computed by batched matrix products, and laid back.

Keys, values and queries are gathered again in the backward pass instead of kept; what is kept is the probabilities of
small buckets. A bucket whose probabilities would be large runs through PyTorch's flash kernel and keeps none.

Letters: T nodes, H query heads, G key and value heads, d head size; in a bucket R rows, Q queries and K keys per row.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trietune.model.attention.row_blocks import Bucket, RowLayout

# Elements of one bucket's probabilities above which they are recomputed (flash kernel) rather than kept.
MAX_KEPT_PROBABILITIES = 16_000_000


class RowAttention(torch.autograd.Function):
    """Softmax attention of every bucket, gathered, computed and laid back in node order.

    Inputs: query [T * H, d], key and value [T * G, d]; output [T * H, d] in the inputs' dtype. Scores are rounded to
    the inputs' dtype, as in transformers' own `eager` attention; softmax and sums of gradients are taken in fp32
    (fp64 for fp64 inputs).
    """

    @staticmethod
    def forward(
        context: Any,
        query: Float[Tensor, "TH d"],
        key: Float[Tensor, "TG d"],
        value: Float[Tensor, "TG d"],
        layout: RowLayout,
        scale: float,
        softcap: float | None,
    ) -> Float[Tensor, "TH d"]:
        context.layout, context.scale, context.softcap = layout, scale, softcap
        if _is_whole(layout, query, softcap):
            probabilities, out = _attend_whole(layout.buckets[0], query, key, value, scale)
            context.save_for_backward(query, key, value, probabilities)
            return out
        outputs: list[Tensor] = []
        kept: list[Tensor | None] = []
        for bucket in layout.buckets:
            q, k, v = _gather(bucket, query, key, value)
            if _keeps_probabilities(layout, q, k, softcap):
                scores = torch.bmm(q.mul_(scale), k.transpose(1, 2))
                tanh = None
                if softcap is not None:
                    tanh = scores.div_(softcap).tanh_()
                    scores = tanh * softcap
                probabilities = _softmax(scores, bucket)
                outputs.append(torch.bmm(probabilities, v).view(-1, v.shape[-1]))
                kept.extend((probabilities, tanh))
            else:
                out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    *_four_axes(bucket, q, k, v), attn_mask=_tiled_bias(bucket, q), scale=scale
                )
                outputs.append(out.reshape(-1, v.shape[-1]))
                kept.extend((out, log_sum))
        context.save_for_backward(query, key, value, *kept)
        return torch.cat(outputs).index_select(0, layout.output_rows)

    @staticmethod
    def backward(context: Any, grad_output: Float[Tensor, "TH d"]) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = context.saved_tensors
        layout, scale, softcap = context.layout, context.scale, context.softcap
        if _is_whole(layout, query, softcap):
            grads = _attend_whole_backward(layout.buckets[0], grad_output, query, key, value, kept[0], scale)
            return *grads, None, None, None
        grads_q, grads_k, grads_v = [], [], []
        laid_out = _lay_out(grad_output, layout)
        first = 0
        for number, bucket in enumerate(layout.buckets):
            q, k, v = _gather(bucket, query, key, value)
            grad_out = laid_out[first : first + bucket.query_rows.numel()].view(q.shape)
            first += bucket.query_rows.numel()
            saved = kept[2 * number : 2 * number + 2]
            if _keeps_probabilities(layout, q, k, softcap):
                probabilities, tanh = saved
                grad_v = torch.bmm(probabilities.transpose(1, 2), grad_out)
                grad_scores = torch._softmax_backward_data(
                    torch.bmm(grad_out, v.transpose(1, 2)), probabilities, -1, probabilities.dtype
                )
                if tanh is not None:
                    grad_scores.mul_(1 - tanh.square())
                grad_q = torch.bmm(grad_scores, k).mul_(scale)
                grad_k = torch.bmm(grad_scores.transpose(1, 2), q.mul_(scale))
            else:
                out, log_sum = saved
                four = _four_axes(bucket, q, k, v)
                grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad_out.view(four[0].shape),
                    *four,
                    out,
                    log_sum,
                    0.0,
                    False,
                    attn_mask=_tiled_bias(bucket, q),
                    scale=scale,
                )
            grads_q.append(grad_q.reshape(-1, q.shape[-1]))
            grads_k.append(grad_k.reshape(-1, k.shape[-1]))
            grads_v.append(grad_v.reshape(-1, v.shape[-1]))
        return (
            torch.cat(grads_q).index_select(0, layout.output_rows),
            _sum_copies(torch.cat(grads_k), layout),
            _sum_copies(torch.cat(grads_v), layout),
            None,
            None,
            None,
        )


def _is_whole(layout: RowLayout, query: Tensor, softcap: float | None) -> bool:
    """Whether everything is one block in its own order, small enough to keep its probabilities."""
    bucket = layout.buckets[0]
    num_queries, num_keys = bucket.shape[1:]
    num_heads = query.shape[0] // num_queries
    if layout.keeps_none:
        return False
    return bucket.is_whole and softcap is None and num_heads * num_queries * num_keys <= MAX_KEPT_PROBABILITIES


def _attend_whole(bucket: Bucket, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Probabilities [G, H/G * q, k] and outputs [q * H, d] of one block of everything, by heads instead of gathers."""
    k, v = _by_heads(key, bucket.shape[2]), _by_heads(value, bucket.shape[2])
    q = _stack_heads(query, bucket, len(k), scale)
    probabilities = _softmax(torch.bmm(q, k.transpose(1, 2)), bucket)
    return probabilities, _lay_by_node(torch.bmm(probabilities, v), bucket)


def _attend_whole_backward(
    bucket: Bucket, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, probabilities: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    k, v = _by_heads(key, bucket.shape[2]), _by_heads(value, bucket.shape[2])
    q, grad_out = _stack_heads(query, bucket, len(k), scale), _stack_heads(grad_output, bucket, len(k), 1.0)
    grad_v = torch.bmm(probabilities.transpose(1, 2), grad_out)
    grad_scores = torch._softmax_backward_data(
        torch.bmm(grad_out, v.transpose(1, 2)), probabilities, -1, probabilities.dtype
    )
    grad_q = torch.bmm(grad_scores, k).mul_(scale)
    grad_k = torch.bmm(grad_scores.transpose(1, 2), q)
    return (
        _lay_by_node(grad_q, bucket),
        grad_k.transpose(0, 1).reshape(key.shape),
        grad_v.transpose(0, 1).reshape(value.shape),
    )


def _by_heads(x: Tensor, num_nodes: int) -> Tensor:
    """[T * G, d] as [G, T, d]."""
    return x.view(num_nodes, -1, x.shape[-1]).transpose(0, 1)


def _stack_heads(x: Tensor, bucket: Bucket, num_groups: int, factor: float) -> Tensor:
    """[q * H, d] times a number, heads of one key head under each other: [G, H/G * q, d]."""
    by_group = x.view(bucket.shape[1], num_groups, -1, x.shape[-1]).permute(1, 2, 0, 3)
    stacked = x.new_empty(by_group.shape)
    torch.mul(by_group, factor, out=stacked)
    return stacked.view(num_groups, -1, x.shape[-1])


def _lay_by_node(stacked: Tensor, bucket: Bucket) -> Tensor:
    """[G, H/G * q, d] back to [q * H, d]."""
    num_groups, _, head_size = stacked.shape
    return stacked.view(num_groups, -1, bucket.shape[1], head_size).permute(2, 0, 1, 3).reshape(-1, head_size)


def _gather(bucket: Bucket, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [R * G, H/G * q, d], keys and values [R * G, k, d] of one bucket."""
    num_keys = bucket.shape[2]
    groups = bucket.key_rows.numel() // num_keys  # R * G
    return (
        query.index_select(0, bucket.query_rows).view(groups, -1, query.shape[-1]),
        key.index_select(0, bucket.key_rows).view(groups, num_keys, key.shape[-1]),
        value.index_select(0, bucket.key_rows).view(groups, num_keys, value.shape[-1]),
    )


def _keeps_probabilities(layout: RowLayout, q: Tensor, k: Tensor, softcap: float | None) -> bool:
    if softcap is not None or q.device.type != "cpu":
        return True
    return not layout.keeps_none and q.shape[0] * q.shape[1] * k.shape[1] <= MAX_KEPT_PROBABILITIES


def _softmax(scores: Tensor, bucket: Bucket) -> Tensor:
    """Probabilities of masked scores, in their dtype.

    The mask is fp32, and so is what it is added to: PyTorch's softmax of bf16 on CPU takes up to twice as long as that
    of fp32, where rows are not a multiple of 32 long.
    """
    masked = torch.add(_grid(scores, bucket), bucket.bias).view(scores.shape)
    return torch.softmax(masked, -1).to(scores.dtype)


def _grid(scores: Tensor, bucket: Bucket) -> Tensor:
    """Scores [R * G, H/G * q, k] as [R, G, H/G, q, k]."""
    num_rows, num_queries, num_keys = bucket.shape
    return scores.view(num_rows, scores.shape[0] // num_rows, -1, num_queries, num_keys)


def _four_axes(bucket: Bucket, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.view(bucket.shape[0], -1, x.shape[1], x.shape[2]) for x in tensors)


def _tiled_bias(bucket: Bucket, q: Tensor) -> Tensor:
    """The bias [R, 1, H/G * q, k]: one copy for each of the heads stacked under each other."""
    return bucket.bias[:, 0].to(q.dtype).repeat(1, 1, q.shape[1] // bucket.shape[1], 1)


def _lay_out(grad_output: Tensor, layout: RowLayout) -> Tensor:
    """The gradient of the buckets' outputs, end to end; zero at padding queries."""
    total = sum(bucket.query_rows.numel() for bucket in layout.buckets)
    return grad_output.new_zeros(total, grad_output.shape[-1]).index_copy_(0, layout.output_rows, grad_output)


def _sum_copies(grads: Float[Tensor, "P d"], layout: RowLayout) -> Float[Tensor, "TG d"]:
    """Add the gradients of all copies of a key; `embedding_bag` sums segments in fp32 and in a fixed order."""
    return torch.nn.functional.embedding_bag(layout.key_order, grads, layout.key_start, mode="sum")
