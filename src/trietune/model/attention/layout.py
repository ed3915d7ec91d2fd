"""What attention needs to know of a trie: who sees whom, in the form that each way to attend reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from trietune.model.attention.flex import FlexLayout, build_flex_layout
from trietune.model.attention.row_blocks import AttentionCost, RowLayout, build_row_layout
from trietune.model.attention.varlen import VarlenLayout, build_varlen_layout
from trietune.model.states.scan import TrieStates
from trietune.trie import Trie
from trietune.trie.segments import branch_points

AttentionKind = Literal["rows", "varlen", "flex", "mask"]


@dataclass(frozen=True, slots=True)
class ForcedRows:
    """How rows are cut whatever the cost model would choose, so that a small trie proves what a large one runs through.

    Attributes:
        cost: by which the cut is chosen.
        keeps_none: see `RowLayout`.
        cuts: where paths are cut for layers with a state: nowhere, at every branch point, or where it costs least.
    """

    cost: AttentionCost
    keeps_none: bool = False
    cuts: Literal["none", "all", "cheapest"] = "cheapest"


@dataclass(frozen=True, slots=True)
class AttentionNote:
    """One call of attention: query [Q, H, d], key and value [T, G, d], and what the layer said."""

    query: Tensor
    key: Tensor
    value: Tensor
    window: int | None
    scale: float
    softcap: float | None
    is_pruned: bool


class TrieLayout:
    """What attention needs to know of one trie; built once a micro-batch and shared by all layers.

    Layers with a sliding window get a layout of their own, made when the first of them asks.

    Args:
        kind: `rows`, `varlen`, `flex`, or `mask`: all nodes at once under a [T, T] mask, the reference.
        query_nodes: nodes, ascending, whose hidden states are wanted of the last layer; None wants all.
        to_device: takes what was built on the host to `device`.
        forced: how rows are cut; None leaves it to the cost model.

    Attributes:
        notes: where it is a list, every call of attention is noted there, for proofs of kernels.
    """

    def __init__(
        self,
        trie: Trie,
        *,
        kind: AttentionKind,
        num_heads: int,
        num_key_heads: int,
        device: torch.device,
        query_nodes: Int64[np.ndarray, " Q"] | None = None,
        to_device: Callable[[Tensor], Tensor] | None = None,
        forced: ForcedRows | None = None,
    ) -> None:
        self.kind = kind
        self.notes: list[AttentionNote] | None = None
        self._forced = forced
        self._to_device = to_device or (lambda tensor: tensor.to(device))
        self.query_nodes = None if query_nodes is None else self._to_device(torch.from_numpy(query_nodes))
        self._query_nodes = query_nodes
        self._trie = trie
        self._num_heads = num_heads
        self._num_key_heads = num_key_heads
        self._device = device
        self._rows: dict[tuple[int | None, int, torch.dtype, bool], RowLayout] = {}
        self._varlen: dict[tuple[int | None, bool], VarlenLayout] = {}
        self._flex: dict[tuple[int | None, bool], FlexLayout] = {}
        self._masks: dict[int | None, Bool[Tensor, "1 1 T T"]] = {}
        self._deepest = int(trie.position_ids.max(initial=0))
        self._states: TrieStates | None = None

    @property
    def carrier(self) -> TrieStates:
        """What follows what, for layers that carry a state."""
        if self._states is None:
            self._states = self.states()
        return self._states

    def states(self, *, keeps: Int[np.ndarray, " B"] | None = None) -> TrieStates:
        """The same, not cached; `keeps` as in `TrieStates`."""
        forced: dict[str, list[int] | None] = {"none": [], "all": branch_points(self._trie), "cheapest": None}
        cuts = None if self._forced is None else forced[self._forced.cuts]
        return TrieStates(self._trie, device=self._device, to_device=self._to_device, cuts=cuts, keeps=keeps)

    def rows(self, window: int | None, head_size: int, dtype: torch.dtype, *, is_pruned: bool = False) -> RowLayout:
        """The buckets for a layer.

        Args:
            window: number of positions that a query sees, itself included.
            is_pruned: only `query_nodes` query.
        """
        key = (self._effective(window), head_size, dtype, is_pruned)
        if key not in self._rows:
            self._rows[key] = build_row_layout(
                self._trie,
                self._query_nodes if is_pruned else None,
                window=key[0],
                num_heads=self._num_heads,
                num_key_heads=self._num_key_heads,
                head_size=head_size,
                dtype=dtype,
                device=self._device,
                cost=None if self._forced is None else self._forced.cost,
                keeps_none=self._forced is not None and self._forced.keeps_none,
            )
        return self._rows[key]

    def varlen(self, window: int | None, *, is_pruned: bool = False) -> VarlenLayout:
        """The runs for a layer; arguments as in `rows`."""
        key = (self._effective(window), is_pruned)
        if key not in self._varlen:
            query_nodes = self._query_nodes if is_pruned else None
            self._varlen[key] = build_varlen_layout(self._trie, query_nodes, window=key[0], to_device=self._to_device)
        return self._varlen[key]

    def flex(self, window: int | None, *, is_pruned: bool = False) -> FlexLayout:
        """The mask of blocks for a layer; arguments as in `rows`."""
        key = (self._effective(window), is_pruned)
        if key not in self._flex:
            query_nodes = self._query_nodes if is_pruned else None
            self._flex[key] = build_flex_layout(self._trie, query_nodes, window=key[0], to_device=self._to_device)
        return self._flex[key]

    def mask(self, window: int | None) -> Bool[Tensor, "1 1 T T"]:
        """True where a query (third axis) sees a key (fourth)."""
        window = self._effective(window)
        if window not in self._masks:
            self._masks[window] = self._to_device(torch.from_numpy(visibility(self._trie, window)))[None, None]
        return self._masks[window]

    def _effective(self, window: int | None) -> int | None:
        return None if window is None or window > self._deepest else window


def visibility(trie: Trie, window: int | None = None) -> Bool[np.ndarray, "T T"]:
    """`[i, j]` is True when node `i` sees node `j`."""
    node = np.arange(trie.num_nodes)
    return trie.sees(node[:, None], node[None], window)
