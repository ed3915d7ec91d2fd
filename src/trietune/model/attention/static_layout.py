"""What attention needs to know of a micro-batch of static shape: masks that were built on the host."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from trietune.trie import Trie


class StaticLayout:
    """As `TrieLayout` for rows of a forest that attend under masks; one mask for each window that a layer asks for.

    Args:
        forest: S tries of W nodes each, padding included.
        num_rows: S.
        deepest: greatest depth that the run can meet. A window beyond it needs no mask of its own.
        to_device: takes a mask to the device.
    """

    kind = "mask"
    query_nodes = None

    def __init__(self, forest: Trie, *, num_rows: int, deepest: int, to_device: Callable[[Tensor], Tensor]) -> None:
        self._forest = forest
        self._num_rows = num_rows
        self._deepest = deepest
        self._to_device = to_device
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None) -> Tensor:
        """True where a query (third axis) sees a key (fourth): [S, 1, W, W]."""
        window = None if window is None or window > self._deepest else window
        if window not in self._masks:
            sees = visibility_of_rows(self._forest, self._num_rows, window)
            self._masks[window] = self._to_device(torch.from_numpy(sees[:, None]))
        return self._masks[window]


def visibility_of_rows(forest: Trie, num_rows: int, window: int | None = None) -> np.ndarray:
    """`[r, i, j]` is True when node `i` of row `r` sees node `j` of that row; bool [S, W, W]."""
    node = np.arange(forest.num_nodes).reshape(num_rows, -1)
    return forest.sees(node[:, :, None], node[:, None, :], window)
