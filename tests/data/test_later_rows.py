"""The first row decides how data is read; what only later rows bring is refused or named, never dropped in silence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from load_rows import load_rows

from trietune.data.loaded_data import Data
from trietune.errors import UserError

PAIR = {"prompt": "a", "completion": " b"}
ALPACA = {"instruction": "do", "output": "done"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
Load = Callable[..., tuple[Data, list[str]]]


@pytest.fixture
def load(tokenizer: Any, tmp_path: Path) -> Load:
    """`load(rows)`: the data of these rows, and what was said about them."""
    return partial(load_rows, tokenizer=tokenizer, folder=tmp_path)


@pytest.mark.parametrize(
    ("first", "later", "reason"),
    [
        (PAIR, {**PAIR, "weight": 0}, "rows.jsonl:4: it has a `weight`, and the first row of the data has none"),
        (CHAT, {**CHAT, "weight": 0.5}, "rows.jsonl:4: it has a `weight`"),
        (PAIR, {**PAIR, "label": False}, "rows.jsonl:4: `label` says whether its completion is wanted"),
        ({**PAIR, "label": None}, {**PAIR, "label": True}, "rows.jsonl:4: `label` says whether"),
        (ALPACA, {**ALPACA, **CHAT}, "rows.jsonl:4: it has `messages`, and the first row of the data `instruction`"),
        (ALPACA, {**ALPACA, **PAIR}, "rows.jsonl:4: it has `prompt`, `completion`, and the first row"),
    ],
)
def test_a_later_row_that_would_be_learned_otherwise_is_refused(
    first: dict[str, Any], later: dict[str, Any], reason: str, load: Load
) -> None:
    with pytest.raises(UserError) as refused:
        load([first] * 3 + [later] * 3, **({"chat_template": None} if first is not CHAT else {}))
    assert reason in str(refused.value)


def test_a_weight_that_holds_nothing_is_none(load: Load) -> None:
    data, _ = load([PAIR] * 10 + [{**PAIR, "weight": None}] * 10)
    assert data.counts.train.kept == 19


def test_a_weight_that_a_template_writes_is_text(load: Load) -> None:
    words = {"prompt_template": "{prompt} {weight?}", "completion_template": "{completion}"}
    data, _ = load([PAIR] * 10 + [{**PAIR, "weight": 5}] * 10, **words)
    assert {data.train.examples[index].prompt for index in range(len(data.train.examples))} == {"a ", "a 5"}


def test_columns_of_later_rows_that_nothing_uses_are_named_with_their_rows(load: Load) -> None:
    rows = [{**PAIR, "old": 1}] + [PAIR] * 20 + [{**PAIR, "note": "important"}, {**PAIR, "note": None}]
    for _ in ("read", "from the cache"):
        data, lines = load(rows)
        assert "columns of `rows.jsonl` that nothing uses: `old`" in lines
        assert any("1 with a column `note`, which the first row has not" in line for line in lines)
        assert data.counts.train.late_columns["note"].samples == ("rows.jsonl:22",)


def test_a_form_whose_columns_hold_nothing_is_not_the_form_of_the_data(load: Load) -> None:
    empty = {"messages": None, "prompt": None, "completion": None}
    data, _ = load([{**empty, "text": "a film"}] * 20)
    assert data.train.examples[0].completion == "a film"
    with pytest.raises(UserError, match=r"rows.jsonl:4: it has `prompt`, `completion`"):
        load([{**empty, "text": "a film"}] * 3 + [{**empty, **PAIR, "text": None}] * 3)


def test_completions_that_read_as_a_missing_value_are_kept_and_said(load: Load) -> None:
    rows = [{"prompt": f"row {number}", "completion": f" text {number}"} for number in range(40)]
    words = ["nan", "NaN ", "None", "null", "N/A", "nano", "none of these", "0", "false"]
    data, lines = load(rows + [{"prompt": "a", "completion": word} for word in words], task="text")
    assert data.counts.train.kept == len(rows) + len(words) - 2
    assert data.counts.train.missing_in_words.number == 5
    assert any("5 whose completion reads as a missing value does (`nan`, `None`), kept as text" in one for one in lines)
