"""Decode many prompts together that share their beginnings, with the shared keys and values kept once.

Prefill computes the trie of all prompts, each distinct token once, and keeps keys and values of its nodes. Then every
prompt goes on by itself, one token per step. Prompts that are neighbors in the trie form a *group*, which holds the
nodes that any of them sees; a query attends its group's nodes under a bias, and its own new tokens:

    group 0   nodes of paragraph A            rows  A-who  A-when  A-where      new tokens  [3, steps]
    group 1   nodes of paragraphs B and C     rows  B-who  C-who                new tokens  [2, steps]

Large groups keep less and read less, but compute scores that the bias then hides; small ones cost an operation each.
The cut into groups weighs one against the other. Rows come and go: a finished one leaves, and the prompts of another
trie may join while older ones still decode.

Letters: T nodes, R rows of a group, B rows in all, K nodes of a group, S new tokens, H query heads, G key and value
heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trietune.model.attention.attend import check_known, trie_attention
from trietune.model.attention.layout import TrieLayout
from trietune.model.states.rows import RowStates
from trietune.trie import Trie

# Scores (a row times a node) whose computation takes as long as the calls that one more group costs. For nine heads of
# 64 on one CPU core: 70 us a group and 0.016 us a score in bf16, 30 us and 0.035 us in fp32; between the two ratios.
SCORES_WORTH_A_GROUP = 2000

# New tokens per row that memory is first kept for; doubled whenever a row needs more.
FIRST_CAPACITY = 16


@dataclass(slots=True)
class Group:
    """Rows that attend the same nodes.

    Attributes:
        depths: int64 [K], of the nodes.
        sees: bool [R, K], which node lies on which row's path.
        keys, values: [G, K, d] by layer.
    """

    depths: Tensor
    sees: Tensor
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return len(self.sees)


class Prefill:
    """Attention over the trie of all prompts that hands the keys and values of each layer to the groups.

    Args:
        ends: int [B], the last node of each prompt, ascending.

    Attributes:
        carrier: keeps the states of layers that have some where prompts end.
    """

    def __init__(self, trie: Trie, ends: np.ndarray, layout: TrieLayout, device: torch.device) -> None:
        self._layout = layout
        self.carrier = layout.states(keeps=ends)
        self.groups: list[Group] = []
        self._nodes: list[Tensor] = []
        on_path = trie.sees(ends[:, None], np.arange(trie.num_nodes)[None])
        for first, last in cut_into_groups(on_path):
            sees = on_path[first:last]
            nodes = np.flatnonzero(sees.any(axis=0))
            self._nodes.append(torch.from_numpy(nodes).to(device))
            self.groups.append(
                Group(
                    depths=torch.from_numpy(trie.position_ids[nodes].astype(np.int64)).to(device),
                    sees=torch.from_numpy(sees[:, nodes]).to(device),
                )
            )

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        """query [1, H, T, d], key and value [1, G, T, d] -> [1, T, H, d]."""
        layer = _layer_of(module)
        for group, nodes in zip(self.groups, self._nodes, strict=True):
            group.keys[layer] = key[0].index_select(1, nodes)
            group.values[layer] = value[0].index_select(1, nodes)
        return trie_attention(module, query, key, value, None, trie_layout=self._layout, **how)[0]


def cut_into_groups(on_path: np.ndarray) -> list[tuple[int, int]]:
    """Cut sorted prompts into runs `first .. last - 1`, each a group, at the least cost in all.

    Args:
        on_path: bool [B, T], the nodes of each prompt's path. In sorted order a prompt shares with an earlier one at
            most what it shares with the one before it, so a run's nodes are a sum over neighbors.
    """
    lengths = on_path.sum(axis=1)
    shared = np.concatenate(([0], (on_path[1:] & on_path[:-1]).sum(axis=1)))
    num_prompts = len(lengths)
    nodes_until = np.concatenate(([0], np.cumsum(lengths - shared)))
    cost, best_first = np.zeros(num_prompts + 1), np.zeros(num_prompts + 1, np.int64)
    for last in range(1, num_prompts + 1):
        first = np.arange(last)
        num_nodes = nodes_until[last] - nodes_until[first] + shared[first]
        choice = cost[first] + (last - first) * num_nodes + SCORES_WORTH_A_GROUP
        best_first[last] = choice.argmin()
        cost[last] = choice[best_first[last]]
    runs, last = [], num_prompts
    while last > 0:
        runs.append((int(best_first[last]), last))
        last = int(best_first[last])
    return runs[::-1]


class Decoding:
    """Rows that decode together, one token per step, and the keys and values that they see.

    Attributes:
        carrier: their states, in layers that have some.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.carrier = RowStates()
        self._groups: list[Group] = []
        self._keys: dict[int, Tensor] = {}  # of new tokens, [B, G, capacity, d] by layer
        self._values: dict[int, Tensor] = {}
        self._capacity = FIRST_CAPACITY
        self._num_new = torch.zeros(0, dtype=torch.long, device=device)
        self._depths = torch.zeros(0, dtype=torch.long, device=device)
        self._biases: dict[int | None, list[Tensor]] = {}
        self._row = torch.zeros(0, dtype=torch.long, device=device)
        self._width = 0

    @property
    def num_rows(self) -> int:
        return len(self._num_new)

    @property
    def position_ids(self) -> Tensor:
        """Depth of the token that each row computes next: [1, B]."""
        return self._depths[None]

    def join(self, prompts: Prefill, prompt_lengths: np.ndarray) -> None:
        """The rows of `prompts`, which have been computed, decode from now on, after those that are here."""
        groups = prompts.groups
        self.carrier.join(prompts.carrier)
        num_rows = sum(group.num_rows for group in groups)
        for new, of_nodes in ((self._keys, groups[0].keys), (self._values, groups[0].values)):
            for layer, like in of_nodes.items():
                empty = like.new_zeros(num_rows, like.shape[0], self._capacity, like.shape[2])
                new[layer] = torch.cat((new[layer], empty)) if layer in new else empty
        self._groups += groups
        self._num_new = torch.cat((self._num_new, self._num_new.new_zeros(num_rows)))
        self._depths = torch.cat((self._depths, torch.from_numpy(prompt_lengths).to(self._depths)))

    def keep(self, is_kept: np.ndarray) -> None:
        """Rows where `is_kept` (bool [B]) is False have finished and leave."""
        if is_kept.all():
            return
        rows = torch.from_numpy(np.flatnonzero(is_kept)).to(self._device)
        self.carrier.keep(rows)
        for new in (self._keys, self._values):
            for layer, of_rows in new.items():
                new[layer] = of_rows.index_select(0, rows)
        self._num_new, self._depths = self._num_new[rows], self._depths[rows]
        first, groups = 0, []
        for group in self._groups:
            kept = is_kept[first : first + group.num_rows]
            first += group.num_rows
            if kept.any():
                group.sees = group.sees[torch.from_numpy(kept).to(self._device)]
                groups.append(group)
        self._groups = groups

    def begin_step(self) -> None:
        """Before the network computes the next token of every row."""
        self._biases = {}
        self._row = torch.arange(self.num_rows, device=self._device)
        self._width = int(self._num_new.max()) + 1
        if self._width > self._capacity:
            for new in (self._keys, self._values):
                for layer, of_rows in new.items():
                    new[layer] = torch.cat((of_rows, torch.zeros_like(of_rows)), dim=2)
            self._capacity *= 2

    def end_step(self) -> None:
        """After it has: the token is one of the row's own now."""
        self._num_new = self._num_new + 1
        self._depths = self._depths + 1

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **other: object,
    ) -> Tensor:
        """query [1, H, B, d], key and value [1, G, B, d] -> [1, B, H, d]."""
        check_known(module, other)
        layer = _layer_of(module)
        num_key_heads, num_rows, head_size = key.shape[1:]
        self._keys[layer][self._row, :, self._num_new] = key[0].transpose(0, 1)
        self._values[layer][self._row, :, self._num_new] = value[0].transpose(0, 1)
        new_keys, new_values = (new[layer][:, :, : self._width] for new in (self._keys, self._values))
        query = query[0].view(num_key_heads, -1, num_rows, head_size)  # heads of one key head are neighbors
        query = query * (head_size**-0.5 if scaling is None else scaling)
        on_new = query.permute(2, 0, 1, 3) @ new_keys.transpose(2, 3)  # [B, G, H/G, S]
        outputs, first = [], 0
        for group, bias in zip(self._groups, self._biases_of(sliding_window), strict=True):
            rows, first = slice(first, first + group.num_rows), first + group.num_rows
            keys, values = group.keys[layer], group.values[layer]
            # The group's rows and heads are one matrix a key head: [G, H/G * R, d] with [G, d, K].
            on_nodes = query[:, :, rows].reshape(num_key_heads, -1, head_size) @ keys.transpose(1, 2)
            on_nodes = on_nodes.view(*query.shape[:2], group.num_rows, -1)
            scores = torch.cat((on_nodes, on_new[rows].permute(1, 2, 0, 3)), dim=3)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            weights = (scores + bias).softmax(dim=-1).to(query.dtype)
            of_nodes, of_new = weights[..., : keys.shape[1]], weights[..., keys.shape[1] :]
            seen = (of_nodes.reshape(num_key_heads, -1, keys.shape[1]) @ values).view(*query.shape[:2], -1, head_size)
            outputs.append(seen.permute(2, 0, 1, 3) + of_new.permute(2, 0, 1, 3) @ new_values[rows])
        return torch.cat(outputs).view(1, num_rows, -1, head_size)

    def _biases_of(self, window: int | None) -> list[Tensor]:
        """For each group [R, K + S]: 0 where a row sees a node or new token, -inf elsewhere; made once per step."""
        if window not in self._biases:
            # In fp32 at least: adding it takes the scores there, and softmax is computed in what it is given.
            dtype = torch.promote_types(next(iter(self._keys.values())).dtype, torch.float32)
            back = self._num_new[:, None] - torch.arange(self._width, device=self._device)
            is_new = back >= 0 if window is None else (back >= 0) & (back < window)
            biases, first = [], 0
            for group in self._groups:
                rows, first = slice(first, first + group.num_rows), first + group.num_rows
                sees = group.sees
                if window is not None:
                    sees = sees & (self._depths[rows, None] - group.depths < window)
                sees = torch.cat((sees, is_new[rows]), dim=1)
                biases.append(torch.zeros(sees.shape, dtype=dtype, device=self._device).masked_fill_(~sees, -torch.inf))
            self._biases[window] = biases
        return self._biases[window]


def _layer_of(module: nn.Module) -> int:
    return int(module.layer_idx)  # type: ignore[arg-type]  # every attention of transformers has it


def decoding_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attends: Prefill | Decoding,
    **how: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: whatever phase generation is in attends."""
    return attends.attend(module, query, key, value, **how), None


def register() -> str:
    """Make the attention known to transformers and return its name; may be called again."""
    from transformers import AttentionInterface

    name = "trietune-decoding"
    AttentionInterface.register(name, decoding_attention)
    return name
