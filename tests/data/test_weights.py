"""Weights of rows and of messages reach the labels that they belong to, and are counted where they are 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.test_preferences import USER, Loader, says
from tiny_model import write_tiny_model
from trietune import UserError
from trietune.data.columns import RowFormat
from trietune.data.encoder import load_tokenizer
from trietune.data.loaded_data import Data
from trietune.data.rows import FileRows, SlicedRows
from trietune.data.weights import find_weighting


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def load(tokenizer: Any, tmp_path: Path) -> Loader:
    return Loader(tokenizer, tmp_path)


def label_weights(data: Data, index: int) -> list[float]:
    """Of the labels of a sequence."""
    train = data.train
    begin, end = int(train.offsets[index]), int(train.offsets[index + 1])
    assert train.weights is not None
    return train.weights[begin:end][train.labels[begin:end] != -100].tolist()


def test_a_row_weighs_all_its_labels(load: Loader) -> None:
    rows = [{"prompt": "q:", "completion": " yes", "weight": w} for w in (1, -0.5, 2)]
    data = load(rows, objective="sft")
    assert [set(label_weights(data, index)) for index in range(3)] == [{1}, {-0.5}, {2}]
    assert data.validation is not None
    assert data.validation.weights is None  # measured alike


def test_examples_of_weight_zero_are_left_out_and_counted(load: Loader) -> None:
    rows = [{"prompt": "q:", "completion": f" {w}", "weight": w} for w in (1, 0)]
    data = load(rows, objective="sft")
    assert len(data.train) == 1
    assert data.counts.train.without_weight.number == 1
    assert any("1 of weight 0, left out (train.jsonl:2)" in line for line in load.said)
    assert data.validation is not None
    assert len(data.validation) == 2
    with pytest.raises(UserError, match="weights are 0"):
        load([{"prompt": "q:", "completion": " a", "weight": 0}], objective="sft")


def test_a_message_weighs_its_own_labels(load: Loader) -> None:
    messages = [USER, {**says("yes"), "weight": 0.5}, USER, says("no"), USER, {**says("well"), "weight": 0}]
    data = load([{"messages": messages, "weight": 2}, {"messages": [USER, says("so")], "weight": 3}], objective="sft")
    given, said = load.text(data, 0)
    assert said.replace("<eos>", "") == "yesno"
    assert "well" in given
    weights = label_weights(data, 0)
    changes = np.flatnonzero(np.diff(weights))
    assert weights[0] == 1.0
    assert weights[-1] == 2.0
    assert len(changes) == 1
    assert set(label_weights(data, 1)) == {3}


def test_messages_as_json_text_have_weights_too(load: Loader) -> None:
    data = load([{"messages": json.dumps([USER, {**says("yes"), "weight": 0.5}])}], objective="sft")
    assert set(label_weights(data, 0)) == {0.5}


def test_a_weight_in_a_template_is_text(load: Loader) -> None:
    data = load(
        [{"name": "cat", "weight": 4}], objective="sft", prompt_template="{name}:", completion_template=" {weight} kg"
    )
    assert data.train.weights is None
    assert load.text(data, 0)[1].startswith(" 4 kg")


def test_data_without_weights_keeps_its_fingerprint(load: Loader) -> None:
    plain = load([{"messages": [USER, says("yes")]}], objective="sft")
    assert plain.train.weights is None
    weighted = load([{"messages": [USER, {**says("yes"), "weight": 1}]}], objective="sft")
    assert weighted.train.weights is not None
    again = load([{"messages": [USER, {**says("yes"), "weight": 1}]}], objective="sft")
    assert np.array_equal(again.train.weights, weighted.train.weights)


def test_conversations_without_weights_are_not_parsed_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"messages": [USER, says("light")]}) + "\n")
    read = FileRows.read
    passes: list[int] = []
    monkeypatch.setattr(FileRows, "read", lambda self: (passes.append(1), read(self))[1])
    rows = SlicedRows(FileRows.of([path]), 0, 1)
    assert find_weighting(rows, RowFormat("messages")) is None
    assert not passes
    # A file that is a table, or escapes letters, is read.
    path.write_text(json.dumps({"messages": [USER, says("a")]}).replace("hi", "h\\u0069") + "\n")
    assert find_weighting(rows, RowFormat("messages")) is None
    assert passes


@pytest.mark.parametrize("value", ["much", None, True, [1]])
def test_a_weight_that_is_no_number_is_refused(value: object, load: Loader) -> None:
    with pytest.raises(UserError, match="not a number"):
        load([{"prompt": "q:", "completion": " a", "weight": value}], objective="sft")
    if value is not None:
        with pytest.raises(UserError, match="not a number"):
            load([{"messages": [USER, {**says("a"), "weight": value}]}], objective="sft")


def test_weights_follow_tokens_that_are_cut(load: Loader) -> None:
    rows = [
        {"prompt": "0123456789:", "completion": " yes", "weight": 2},
        {"prompt": "q:", "completion": " no", "weight": 3},
    ]
    data = load(rows, objective="sft", max_length=10, overlong="truncate_prompt")
    assert data.train.weights is not None
    assert len(data.train.weights) == len(data.train.labels)
    assert [set(label_weights(data, index)) for index in range(2)] == [{2}, {3}]


def test_another_objective_says_that_it_has_no_weights(load: Loader) -> None:
    load([{"prompt": "q:", "chosen": " a", "rejected": " b", "weight": 2}])
    assert any("`weight` is not used" in line for line in load.said)
