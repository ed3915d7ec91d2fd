"""States of rows that decode together: each of the positions that are computed at once continues from a row of its own.

Letters: B rows, D channels, K width of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trietune.model.states.kinds import Place, Run
    from trietune.model.states.scan import TrieStates


class RowStates:
    """A `Carrier`: one position [1, B, ...] of each row, and by call what the row has left behind."""

    def __init__(self) -> None:
        self._states: dict[Place, Tensor] = {}  # [B, ...]
        self._inputs: dict[Place, Tensor] = {}  # [B, D, K - 1]

    def join(self, prompts: TrieStates) -> None:
        """The kept nodes of a trie are rows from now on, after those that are here."""
        for mine, theirs in ((self._states, prompts.states), (self._inputs, prompts.inputs)):
            for place, new in theirs.items():
                mine[place] = torch.cat((mine[place], new)) if place in mine else new

    def keep(self, rows: Tensor) -> None:
        """Only these rows, int64, are left."""
        for mine in (self._states, self._inputs):
            for place, of_rows in mine.items():
                mine[place] = of_rows.index_select(0, rows)

    def window(self, place: Place, x: Tensor, width: int, run: Callable[[Tensor], Tensor]) -> Tensor:
        """See `Carrier`: x [1, D, B], a position of each row."""
        seen = torch.cat((self._inputs[place], x.permute(2, 1, 0)), dim=2)
        self._inputs[place] = seen[:, :, 1:]
        return run(seen)[:, :, -1:].permute(2, 1, 0)

    def scan(self, place: Place, inputs: list[Tensor], run: Run) -> Tensor:
        """See `Carrier`: inputs [1, B, ...], a position of each row."""
        out, state = run([x.transpose(0, 1) for x in inputs], self._states[place], True)
        self._states[place] = state.to(torch.promote_types(state.dtype, torch.float32))
        return out.transpose(0, 1)
