"""Four ways to compute a trie wrongly, each of which a proof must notice: for the column `caught` of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from trietune.model.attention import layout as trie_layout
from trietune.model.causal_lm import TrieModel
from trietune.model.fast import attention_layer
from trietune.model.rows.grid import RowGrid
from trietune.trie import Trie

Mutate = Callable[[pytest.MonkeyPatch, list[str]], None]


def breaks_the_mask(patch: pytest.MonkeyPatch, happened: list[str]) -> None:
    """One ancestor of a row becomes a node beside the row's path; whole rows hold another node's numbers."""
    build, sees, states = trie_layout.build_row_layout, trie_layout.visibility, trie_layout.TrieStates
    spread = RowGrid.to_rows

    def broken(trie: Trie) -> Trie:
        path = trie.row_path.copy()
        for row in range(1, trie.num_rows):
            begin, end = int(trie.row_path_start[row]), int(trie.row_path_start[row + 1])
            own = int(trie.row_start[row + 1] - trie.row_start[row])
            beside = int(trie.row_start[row]) - 1
            if end - begin > own and path[end - own - 1] != beside:
                happened.append("mask")
                path[end - own - 1] = beside
        return replace(trie, row_path=path)

    def visibility(trie: Trie, window: int | None = None) -> np.ndarray:
        happened.append("mask")
        node = np.arange(trie.num_nodes)
        return np.asarray(sees(trie, window) | (node[None] == node[:, None] - 1))

    def to_rows(grid: RowGrid, x: torch.Tensor) -> torch.Tensor:
        happened.append("mask")
        return spread(grid, torch.cat((x[1:], x[:1])))

    patch.setattr(trie_layout, "build_row_layout", lambda trie, *args, **how: build(broken(trie), *args, **how))
    patch.setattr(trie_layout, "visibility", visibility)
    patch.setattr(trie_layout, "TrieStates", lambda trie, **how: states(broken(trie), **how))
    patch.setattr(RowGrid, "to_rows", to_rows)


def counts_on_after_a_branch(patch: pytest.MonkeyPatch, happened: list[str]) -> None:
    """Positions go on from the branch's depth plus one, as if a token had been there."""
    right = TrieModel.decode

    def decode(self: TrieModel, input_ids: np.ndarray, position_ids: np.ndarray, mask: Any, layout: Any) -> Any:
        if layout is not None:
            position_ids = position_ids.copy()
            falls_back = np.flatnonzero(np.diff(position_ids[0]) < 0) + 1
            branches = [at for at in falls_back if position_ids[0, at] > 0]
            if branches:
                happened.append("position")
                position_ids[0, branches[0] :] += 1
        return right(self, input_ids, position_ids, mask, layout)

    patch.setattr(TrieModel, "decode", decode)


def moves_positions(patch: pytest.MonkeyPatch, happened: list[str]) -> None:
    """The same, and whole rows give each node the numbers of the next."""
    of_rows = RowGrid.to_nodes

    def to_nodes(grid: RowGrid, x: torch.Tensor) -> torch.Tensor:
        happened.append("position")
        return of_rows(grid, torch.cat((x[1:], x[:1])))

    counts_on_after_a_branch(patch, happened)
    patch.setattr(RowGrid, "to_nodes", to_nodes)


def drops_windows(patch: pytest.MonkeyPatch, happened: list[str]) -> None:
    def effective(self: Any, window: int | None) -> None:
        if window is not None and window <= self._deepest:
            happened.append("window")

    patch.setattr(trie_layout.TrieLayout, "_effective", effective)


def rotates_every_layer(patch: pytest.MonkeyPatch, happened: list[str]) -> None:
    right = attention_layer._agrees

    def agrees(*args: Any) -> bool:
        if not right(*args):
            happened.append("rotation")
        return True

    patch.setattr(attention_layer, "_agrees", agrees)


MUTATIONS: dict[str, Mutate] = {
    "mask": breaks_the_mask,
    "position": moves_positions,
    "window": drops_windows,
    "rotation": rotates_every_layer,
}
