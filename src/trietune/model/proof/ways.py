"""All ways in which a run's attention may compute the nodes of a forest, each as a function that a pass can call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from trietune.model.attention.attend import attend
from trietune.model.attention.layout import AttentionNote, ForcedRows
from trietune.model.attention.row_blocks import AttentionCost
from trietune.model.causal_lm import TrieModel
from trietune.model.proof.forests import Forest
from trietune.model.rows.grid import RowGrid
from trietune.trie import Trie

_WHOLE = ForcedRows(AttentionCost(bucket=1e9, gathered=1.0, score=1e-9, whole=0.0), cuts="none")
GATHERED = ForcedRows(AttentionCost(bucket=0.0, gathered=0.0, score=1.0), cuts="all")
_GATHERED_KEPT_NOWHERE = ForcedRows(AttentionCost(bucket=0.0, gathered=0.0, score=1.0), keeps_none=True)


def ways_of(model: TrieModel) -> list[tuple[str, Callable[[Forest], object]]]:
    """By name; the last one is that of a large batch."""
    if model.whole_rows is not None:
        return [("whole rows", partial(run_whole_rows, model))]
    if model.attention is None:
        return [("padded", partial(run_padded, model))]
    if model.attention == "mask":
        return [("under a mask", partial(run_trie, model, kind="mask", forced=None))]
    ways = [("in one block", _WHOLE), ("every row gathered", GATHERED)]
    if model.device.type == "cpu":
        ways.insert(1, ("gathered, through the flash kernel", _GATHERED_KEPT_NOWHERE))
    return [(label, partial(run_trie, model, kind="rows", forced=forced)) for label, forced in ways]


def run_trie(
    model: TrieModel, forest: Forest, *, kind: Any, forced: ForcedRows | None, query_nodes: np.ndarray | None = None
) -> object:
    return run_layout(model, forest, model.layout(forest.trie, query_nodes, kind=kind, forced=forced))


def run_layout(model: TrieModel, forest: Forest, layout: Any) -> object:
    trie = forest.trie
    return model.decode(trie.input_ids[None], trie.position_ids[None], model.mask_of(layout), layout)


def run_whole_rows(model: TrieModel, forest: Forest) -> object:
    assert model.whole_rows is not None
    grid = RowGrid(forest.trie, model.to_device)
    rows = model.whole_rows.of_rows(grid)
    if not torch.equal(grid.to_nodes(rows.flatten(0, 1)), forest.rows.nodes(rows)):
        raise RuntimeError("nodes are taken from other positions of the rows than those that compute them")
    return rows


def run_padded(model: TrieModel, forest: Forest) -> object:
    rows = forest.rows
    return model.decode(rows.tokens.astype(np.int64), None, rows.is_real.long(), None)


def kernel_error(
    model: TrieModel, trie: Trie, query_nodes: np.ndarray, note: AttentionNote, with_gradients: bool
) -> float:
    told = {
        "window": note.window,
        "scale": note.scale,
        "softcap": note.softcap,
        "is_pruned": note.is_pruned,
    }
    results = []
    for kind, dtype in (
        (model.attention, note.query.dtype),
        ("rows", torch.promote_types(note.query.dtype, torch.float32)),
    ):
        inputs = [x.detach().to(dtype).requires_grad_(with_gradients) for x in (note.query, note.key, note.value)]
        with torch.set_grad_enabled(with_gradients):
            query, key, value = inputs
            out = attend(query, key, value, model.layout(trie, query_nodes, kind=kind), **told)  # type: ignore[arg-type]
        found = [out.detach()]
        if with_gradients:
            cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
            found += torch.autograd.grad(out, inputs, cotangent)
        results.append([x.double() for x in found])
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(*results, strict=True))


@contextmanager
def no_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
