"""How the nodes of a trie attend, and transformers' attention interface in front of it.

    rows     batched products of rows and their paths (`rows.py`): runs anywhere
    varlen   the same rows as sequences of one flash kernel (`varlen.py`)
    flex     one kernel under a mask of blocks (`flex.py`)
    mask     all nodes at once under a `T x T` mask: the reference

Without a trie (padded rows) the function runs that transformers' own file of the layer brings. So it does on a trie in
layers that `attend_by_library` names: under an explicit mask, for what no other way to attend knows.

Letters: T nodes, N nodes that query, H query heads, G key and value heads, d head size.
"""

import sys
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from trietune.errors import UserError
from trietune.model.attention.flex import flex_attend
from trietune.model.attention.layout import AttentionNote, TrieLayout
from trietune.model.attention.rows import RowAttention
from trietune.model.attention.varlen import VarlenAttention

# Arguments of attention that change its result and that no way to attend on a trie knows.
UNKNOWN_TO_TRIES = ("s_aux", "position_bias", "attention_bias", "alibi")

_BY_LIBRARY = "trietune_attends_by_library"


def attend_by_library(module: torch.nn.Module, *, is_on: bool) -> None:
    """Whether `module` attends by the function of its own file on a trie too, under the mask that it is given."""
    vars(module)[_BY_LIBRARY] = is_on


def attends_by_library(module: torch.nn.Module) -> bool:
    return bool(vars(module).get(_BY_LIBRARY, False))


def check_known(module: torch.nn.Module, told: dict[str, object]) -> None:
    """Raise `UserError` if a layer tells its attention function something that would be left out."""
    for name in UNKNOWN_TO_TRIES:
        if told.get(name) is not None:
            raise UserError(
                f"`{type(module).__name__}` passes `{name}` to its attention, which changes the result and which tries "
                "do not know",
                next_step="leave `self_check: True`, which lets such layers attend in transformers' own way",
            )


def trie_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 H T d"],
    key: Float[Tensor, "1 G T d"],
    value: Float[Tensor, "1 G T d"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    trie_layout: TrieLayout | None = None,
    **other: object,
) -> tuple[Float[Tensor, "1 T H d"], Tensor | None]:
    """transformers' attention interface. Without a layout (generation, padded rows) it is transformers' own attention.

    Raises:
        ValueError: if `dropout` is set; attention dropout would need one draw for each pair that a branch sees.
        UserError: the layer passes something that tries do not know.
    """
    if trie_layout is None or attends_by_library(module):
        told = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, "softcap": softcap, **other}
        return _library_attention(module)(module, query, key, value, attention_mask, **told)
    check_known(module, other)
    if dropout:
        raise ValueError("attention dropout is not defined on a trie")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if trie_layout.kind == "mask":
        return _masked(query, key, value, trie_layout.mask(sliding_window), scale, softcap), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(q, k, v, trie_layout, window=sliding_window, scale=scale, softcap=softcap)[None], None


def attend(
    query: Float[Tensor, "Q H d"],
    key: Float[Tensor, "T G d"],
    value: Float[Tensor, "T G d"],
    layout: TrieLayout,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    is_pruned: bool = False,
) -> Float[Tensor, "Q H d"]:
    """Softmax attention of nodes by rows, runs or blocks, as the layout is made for.

    Args:
        window: number of positions that a query sees, itself included.
        is_pruned: only the layout's `query_nodes` query.

    Raises:
        ValueError: a layout of another kind; soft-capping by variable-length attention, whose kernel has none.
    """
    if layout.notes is not None:
        layout.notes.append(AttentionNote(query, key, value, window, scale, softcap, is_pruned))
    match layout.kind:
        case "varlen":
            if softcap is not None:
                raise ValueError("variable-length attention does not support soft-capping")
            runs = layout.varlen(window, is_pruned=is_pruned)
            out: Tensor = VarlenAttention.apply(query, key, value, runs, scale)  # type: ignore[no-untyped-call]
            return out
        case "flex":
            blocks = layout.flex(window, is_pruned=is_pruned)
            return flex_attend(query, key, value, blocks, scale=scale, softcap=softcap)
        case "rows":
            rows = layout.rows(window, query.shape[-1], query.dtype, is_pruned=is_pruned)
            flat = (x.reshape(-1, x.shape[-1]) for x in (query, key, value))
            out = RowAttention.apply(*flat, rows, scale, softcap)  # type: ignore[no-untyped-call]
            return out.view(query.shape)
        case _:
            raise ValueError(f"nodes do not attend by `{layout.kind}` here")


def _masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Float[Tensor, "1 T H d"]:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    else:
        scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
        scores = scores.masked_fill(~mask, -torch.inf)
        accumulate = torch.promote_types(scores.dtype, torch.float32)
        out = torch.softmax(scores, -1, dtype=accumulate).to(query.dtype) @ value
    return out.transpose(1, 2)


def _library_attention(module: torch.nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The plain attention of the layer's own file, which knows its sinks, soft-capping and whatever else it has."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            attention: Callable[..., tuple[Tensor, Tensor | None]] = found
            return attention
    raise NotImplementedError(f"the file of `{type(module).__name__}` has no plain attention")


def register() -> str:
    """Make the attention known to transformers and return its name; may be called again."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    name = "trietune"
    AttentionInterface.register(name, trie_attention)
    # Only used without a layout: additive masks are what transformers' plain attentions take.
    AttentionMaskInterface.register(name, eager_mask)
    return name
