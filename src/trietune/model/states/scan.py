"""A scan over the nodes of a trie by its segments, and a causal window behind the nodes above each row.

    scan      inputs of nodes -> level 0: segments from the root -> states at cuts
                              -> level 1: segments from their cut's state -> ... -> outputs of nodes
    window    inputs of nodes -> rows behind the last width - 1 nodes above them -> outputs of nodes

Gradients flow through gathers, states and outputs by autograd.

Letters: T nodes, D channels; in a bucket S segments of L steps, K kept outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trietune.trie.segments import (
    Context,
    ScanCost,
    Segments,
    branch_points,
    choose_segments,
    context_of,
    make_segments,
)
from trietune.trie.trie import Trie

if TYPE_CHECKING:
    from trietune.model.states.kinds import Place, Run

# Measured for the scans in plain PyTorch on one core: a step takes 0.25 to 0.4 ms forward and backward; a segment that
# starts from a state costs 5 to 15 of them, since a state is 1 MB; a call fewer than 5. Chunks are of 16 steps or more.
CPU_COST = ScanCost(start=10, call=5, multiple=16)
# Of kernels, by the figures of the package `tree-recurrence`: a call takes 10 ms of the host, a step 0.2 us.
CARD_COST = ScanCost(start=50, call=50_000, multiple=64)


@dataclass(frozen=True, slots=True)
class _Bucket:
    """A bucket of segments on the device; see `trie.segments.SegmentBucket`."""

    nodes: Tensor
    shape: tuple[int, int]
    parent: Tensor | None
    kept: Tensor
    num_states: int
    ends: np.ndarray


class TrieStates:
    """What follows what in a trie: a `Carrier`. Made once a micro-batch and shared by all layers.

    Args:
        to_device: takes what was built on the host to the device.
        cuts: nodes that are cut whatever they cost; None leaves all cuts to the costs.
        keeps: nodes, ascending, after which decoding continues: states and inputs there are kept by call.

    Attributes:
        states: of each call, the states [B, ...] after the nodes `keeps`.
        inputs: of each call, the last `width - 1` inputs [B, D, width - 1] up to the nodes `keeps`.
    """

    def __init__(
        self,
        trie: Trie,
        *,
        device: torch.device,
        to_device: Callable[[Tensor], Tensor],
        cuts: list[int] | None = None,
        keeps: np.ndarray | None = None,
    ) -> None:
        self._trie, self._to_device, self._cuts, self._keeps = trie, to_device, cuts, keeps
        self._cost = CPU_COST if device.type == "cpu" else CARD_COST
        self._levels: list[list[_Bucket]] | None = None
        self._order: Tensor | None = None
        self._contexts: dict[int, tuple[Tensor, Tensor]] = {}
        self._ends: dict[int, Tensor] = {}
        self.states: dict[Place, Tensor] = {}
        self.inputs: dict[Place, Tensor] = {}

    def window(self, place: Place, x: Tensor, width: int, run: Callable[[Tensor], Tensor]) -> Tensor:
        """See `Carrier`."""
        packed, own = self._context(width)
        padded = torch.nn.functional.pad(x, (0, 1))
        if self._keeps is not None:
            last = padded[0].index_select(1, self._last_inputs(width))
            self.inputs[place] = last.view(len(last), -1, width - 1).transpose(0, 1)
        return run(padded.index_select(2, packed)).index_select(2, own)

    def scan(self, place: Place, inputs: list[Tensor], run: Run) -> Tensor:
        """See `Carrier`. States are handed on in fp32 at least, whatever the model's dtype."""
        levels, order = self._segments()
        padded = [torch.cat((x[0], x.new_zeros(1, *x.shape[2:]))) for x in inputs]
        kept: list[Tensor] = []
        states: Tensor | None = None
        found: dict[int, Tensor] = {}
        for level in levels:
            finals = []
            for bucket in level:
                at = [x.index_select(0, bucket.nodes).view(*bucket.shape, *x.shape[1:]) for x in padded]
                assert bucket.parent is None or states is not None
                start = None if bucket.parent is None else states.index_select(0, bucket.parent)  # type: ignore[union-attr]
                out, final = run(at, start, bucket.num_states > 0)
                kept.append(out.flatten(0, 1).index_select(0, bucket.kept))
                if bucket.num_states:
                    final = final[: bucket.num_states]
                    finals.append(final.to(torch.promote_types(final.dtype, torch.float32)))
                    if self._keeps is not None:
                        found.update(zip(bucket.ends.tolist(), finals[-1].unbind(), strict=False))
            states = torch.cat(finals) if finals else None
        if self._keeps is not None:
            self.states[place] = torch.stack([found[node] for node in self._keeps.tolist()])
        return torch.cat(kept).index_select(0, order)[None]

    def _segments(self) -> tuple[list[list[_Bucket]], Tensor]:
        if self._levels is None or self._order is None:
            segments = self._choose()
            self._levels = [
                [
                    _Bucket(
                        self._on_device(bucket.nodes.reshape(-1)),
                        (bucket.nodes.shape[0], bucket.nodes.shape[1]),
                        None if bucket.parent is None else self._on_device(bucket.parent),
                        self._on_device(bucket.kept),
                        bucket.num_states,
                        bucket.ends,
                    )
                    for bucket in level
                ]
                for level in segments.levels
            ]
            self._order = self._on_device(segments.order)
        return self._levels, self._order

    def _choose(self) -> Segments:
        if self._keeps is not None:
            # Prompts end at few depths, so that this adds hardly a level.
            return make_segments(
                self._trie, {*branch_points(self._trie), *self._keeps.tolist()}, self._cost, likeness=0.5
            )
        if self._cuts is not None:
            return make_segments(self._trie, self._cuts, self._cost)
        return choose_segments(self._trie, self._cost)

    def _context(self, width: int) -> tuple[Tensor, Tensor]:
        if width not in self._contexts:
            context: Context = context_of(self._trie, width)
            self._contexts[width] = self._on_device(context.packed), self._on_device(context.own)
        return self._contexts[width]

    def _last_inputs(self, width: int) -> Tensor:
        """Nodes of the last `width - 1` positions up to each kept node, flat; T before a path begins."""
        assert self._keeps is not None
        if width not in self._ends:
            parent = parents_of(self._trie)
            nodes = np.full((len(self._keeps), width - 1), self._trie.num_nodes, np.int64)
            at = self._keeps.astype(np.int64)
            for back in range(width - 2, -1, -1):
                nodes[:, back] = np.where(at < 0, self._trie.num_nodes, at)
                at = np.where(at < 0, -1, parent[np.maximum(at, 0)])
            self._ends[width] = self._on_device(nodes.reshape(-1))
        return self._ends[width]

    def _on_device(self, array: np.ndarray) -> Tensor:
        return self._to_device(torch.from_numpy(np.ascontiguousarray(array)))


def parents_of(trie: Trie) -> np.ndarray:
    """The node above each node, -1 above roots: int64 [T]."""
    parent = np.arange(-1, trie.num_nodes - 1)
    own = np.diff(trie.row_start)
    last_above = trie.row_path_start[1:] - own - 1
    has_one = last_above >= trie.row_path_start[:-1]
    parent[trie.row_start[:-1]] = np.where(has_one, trie.row_path[np.maximum(last_above, 0)], -1)
    return parent
