"""Validation data where the data brings none: a part of the training rows, the same in every run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trietune.data.counts import SAMPLES_KEPT, name_places
from trietune.data.examples import TokenSequences
from trietune.data.folders import SplitRole
from trietune.data.rows import Rows
from trietune.data.sources import Sources
from trietune.errors import UserError

# Custom data without validation data: this part of the training rows, at least one and at most so many. The draw does
# not follow `seed`, so runs that differ in it are measured on the same examples.
HELD_OUT_SHARE = 0.05
HELD_OUT_AT_MOST = 1000
HELD_OUT_SEED = 20_230_712
# Sequences whose tokens are in memory together while they are compared with validation data.
SUMMED_AT_ONCE = 4096


def rows_of_split(
    sources: Sources, split: SplitRole | None, report: Callable[[str], None]
) -> tuple[Rows, np.ndarray | None]:
    """The rows to measure, and which of them; None takes all."""
    train = sources.train
    if split is None and sources.validation is None:
        report(f"`{train.name}` has no validation split of its own: every row is measured")
        return train, None
    rows = {"train": train, "validation": sources.validation, "test": sources.test}[split or "validation"]
    held_out = None
    if split in ("train", "validation") and sources.validation is None:
        held_out = draw_held_out(train.count())
        report(describe_held_out(train, held_out))
        rows = train if split == "train" or held_out.any() else None
    if rows is None:
        raise UserError(
            f"`{train.name}` comes without a {split} split",
            next_step="name a file with examples that were not trained on: `validation_file: ...`",
        )
    return rows, ~held_out if split == "train" and held_out is not None else held_out


def draw_held_out(num_rows: int) -> np.ndarray:
    """Which rows are held out of the training data; bool [rows], the same for the same number of rows."""
    number = 0 if num_rows < 2 else min(HELD_OUT_AT_MOST, max(1, round(num_rows * HELD_OUT_SHARE)))
    is_held_out = np.zeros(num_rows, bool)
    is_held_out[np.random.default_rng(HELD_OUT_SEED).choice(num_rows, number, replace=False)] = True
    return is_held_out


def report_shared_rows(train: TokenSequences, validation: TokenSequences, report: Callable[[str], None]) -> None:
    """Say how many validation examples stand in the training data, too: their figures are memory, not skill."""
    keys = [_sums(sequences) for sequences in (train, validation)]
    candidates = np.flatnonzero(np.isin(keys[0], keys[1]))
    seen = {_ids_of(train, int(index)) for index in candidates}
    shared = [index for index in range(len(validation)) if _ids_of(validation, index) in seen]
    if shared:
        places = name_places([validation.ids[index] for index in shared[:SAMPLES_KEPT]], len(shared))
        report(
            f"validation: {len(shared):,} of {len(validation):,} examples also appear in the training data ({places})"
        )


def _sums(sequences: TokenSequences) -> np.ndarray:
    """A number of each sequence that equal ones share; int64 [examples]."""
    offsets = np.asarray(sequences.offsets)
    sums = np.empty(len(sequences), np.int64)
    for first in range(0, len(sequences), SUMMED_AT_ONCE):
        bounds = offsets[first : first + SUMMED_AT_ONCE + 1]
        ids = np.asarray(sequences.input_ids[bounds[0] : bounds[-1]], np.int64)
        totals = np.concatenate([[0], np.cumsum(ids * ids % 1_000_003)])[bounds - bounds[0]]
        sums[first : first + SUMMED_AT_ONCE] = np.diff(totals) * 65_537 + np.diff(bounds)
    return sums


def _ids_of(sequences: TokenSequences, index: int) -> bytes:
    return np.asarray(sequences.input_ids[sequences.offsets[index] : sequences.offsets[index + 1]]).tobytes()


def describe_held_out(rows: Rows, held_out: np.ndarray) -> str:
    number = int(held_out.sum())
    if not number:
        return f"`{rows.name}` is too small to hold validation examples out: nothing will be validated"
    return (
        f"no validation data: {number:,} of {len(held_out):,} rows of `{rows.name}` are held out for it, "
        "the same ones in every run"
    )
