"""Weights of examples and of messages: numbers that multiply the losses of their labels.

    {"prompt": "...", "completion": "...", "weight": 0.5}
    {"messages": [..., {"role": "assistant", "content": "...", "weight": 0}]}

A label of weight 0 is not learned and not counted, as if the data had none there. Weights may be negative.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trietune.data.columns import RowFormat, WrongRow
from trietune.data.encoder import EncodedExamples
from trietune.data.examples import IGNORED_LABEL, Example
from trietune.data.messages import has_weight, is_weight
from trietune.data.opening import BrokenRow
from trietune.data.rows import FileRows, HubRows, Rows, SlicedRows
from trietune.data.templates import find_columns
from trietune.io.json_types import JsonMapping

COLUMN = "weight"


@dataclass(frozen=True, slots=True)
class Weighting:
    """Where a data set has weights; plain values, so that a cache can be named after them.

    Attributes:
        has_column: whether each row has one.
        has_messages: whether some messages have one.
    """

    has_column: bool
    has_messages: bool


def find_weighting(rows: Rows, row_format: RowFormat) -> Weighting | None:
    """Where these rows have weights; None if nowhere. A column that a template uses is text."""
    has_column = COLUMN in rows.columns() and not is_weight_text(row_format)
    has_messages = row_format.kind == "messages" and _any_message_has_one(rows, row_format.message_columns)
    return Weighting(has_column, has_messages) if has_column or has_messages else None


def is_weight_text(row_format: RowFormat) -> bool:
    """Whether a template uses the column as text."""
    templates = (row_format.prompt_template, row_format.completion_template)
    return any(COLUMN in find_columns(one, row_format.template_columns) for one in templates)


def row_weight(row: JsonMapping) -> float:
    """The weight of a row. Raises `WrongRow` if it is not a number."""
    value = row.get(COLUMN)
    # Tables hold text.
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if not is_weight(value):
        raise WrongRow(f"`{COLUMN}` is `{value}`, not a number")
    assert value is not None
    return float(value)


def weigh(
    encoded: EncodedExamples, examples: Sequence[Example], of_rows: Sequence[float], *, only_last: bool
) -> EncodedExamples:
    """The examples with a weight at each token, and no label where that is 0.

    Args:
        of_rows: weight of each example's row.
        only_last: whether only the last message of a conversation has labels.

    Raises:
        WrongRow: messages cannot be told apart in the tokens.
    """
    weights = np.repeat(np.asarray(of_rows, np.float64), encoded.lengths)
    ends = np.cumsum(encoded.lengths)
    for example, begin, end in zip(examples, (ends - encoded.lengths).tolist(), ends.tolist(), strict=True):
        if not example.messages:
            continue
        said = [one.weight for one in example.messages if one.role == "assistant" and one.weight]
        said = said[-1:] if only_last else said
        if all(weight == 1 for weight in said):  # those of weight 0 have no labels
            continue
        is_label = encoded.labels[begin:end] != IGNORED_LABEL
        run = np.cumsum(np.diff(is_label.astype(np.int8), prepend=0) == 1)
        if run[-1] != len(said):
            raise WrongRow("its messages have weights, and the chat template writes nothing between two answers")
        weights[begin:end] *= np.where(is_label, np.array([1.0, *said])[run], 1.0)
    labels = np.where(weights == 0, np.int32(IGNORED_LABEL), encoded.labels)
    return replace(encoded, labels=labels, weights=weights)


def _any_message_has_one(rows: Rows, columns: Sequence[str]) -> bool:
    if isinstance(rows, SlicedRows):
        rows = rows.rows
    # Without the word, no row needs to be parsed.
    if isinstance(rows, HubRows) and COLUMN not in str(rows.dataset.features):
        return False
    if isinstance(rows, FileRows) and rows.options.is_utf8 and not any(_may_hold_one(path) for path in rows.paths):
        return False
    placed = (row for _, row in rows.read() if not isinstance(row, BrokenRow))
    return any(has_weight(row.get(column)) for row in placed for column in columns)


def _may_hold_one(path: Path) -> bool:
    """Whether a file may have a key of that name; only plain JSON can be searched for it."""
    if path.suffix.lower() not in (".json", ".jsonl") or not path.stat().st_size:
        return True
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(COLUMN.encode()) >= 0 or content.find(b"\\u00") >= 0
