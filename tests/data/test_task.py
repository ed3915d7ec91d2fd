"""What a right answer is: the key `task`, and what `auto` decides and says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.test_preferences import USER, Loader, says
from tiny_model import write_tiny_model
from trietune import UserError
from trietune.data.encoder import load_tokenizer
from trietune.data.load import load_data
from trietune.data.loaded_data import Data


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def load(tokenizer: Any, tmp_path: Path) -> Loader:
    return Loader(tokenizer, tmp_path)


def answered(load: Loader, counts: dict[str, int], **settings: Any) -> Data:
    """Data whose completions occur so often, each after a prompt of its own; validation is the same rows."""
    texts = [text for text, count in counts.items() for _ in range(count)]
    rows = [{"prompt": f"row {number}:", "completion": text} for number, text in enumerate(texts)]
    return load(rows, objective="sft", **settings)


def said(load: Loader, text: str) -> list[str]:
    return [line for line in load.said if text in line]


def test_one_misspelt_label_leaves_a_label_task_and_is_listed_with_its_place(load: Loader) -> None:
    task = answered(load, {" good": 30, " bad": 29, " godo": 1}).task
    assert task.kind == "labels"
    assert task.label_names == ("bad", "godo", "good")
    assert said(load, "task: labels, completions take 3 values (bad, godo, good)")
    [line] = said(load, "rare labels")
    assert "`godo` 2x (train.jsonl:60)" in line


@pytest.mark.parametrize("number", [2, 30, 80])
def test_many_classes_are_labels(number: int, load: Loader) -> None:
    task = answered(load, {f" class {index}": 5 for index in range(number)}).task
    assert (task.kind, len(task.labels)) == ("labels", number)


def test_labels_that_differ_in_spaces_have_one_name(load: Loader) -> None:
    task = answered(load, {" yes": 10, " yes ": 5, " no": 12}).task
    assert task.labels == (" no", " yes", " yes ")
    assert task.label_names == ("no", "yes", "yes")
    assert said(load, "differ only in spaces at their ends count as one: yes")


@pytest.mark.parametrize(
    "answers",
    [
        [f" by post {number}" for number in range(10)],
        [" We open at nine.", " You can pay by card.", " Yes, within 30 days.", " No, that is not possible here."],
    ],
)
def test_repeated_answers_of_a_faq_are_no_labels_and_that_is_said(answers: list[str], load: Loader) -> None:
    # Validation holds the same rows here, so each row counts twice.
    texts = dict.fromkeys(answers, 3)
    rows = [{"prompt": f"{text}{number}?", "completion": text} for text in texts for number in range(3)]
    for name in ("train", "own"):
        (load.folder / f"{name}.jsonl").write_text("")
    task = load(rows, objective="sft", validation_file=None).task
    assert task.kind == "text"
    [line] = said(load, "completions repeat")
    assert "`task: labels`" in line
    assert "`task: answers`" in line


def test_the_key_decides_whatever_the_completions_look_like(load: Loader) -> None:
    labels = {" good": 30, " bad": 30}
    assert answered(load, labels, task="text").task.kind == "text"
    assert answered(load, labels, task="answers").task.kind == "answers"
    once = {f" answer {number}": 1 for number in range(12)}
    assert answered(load, once).task.kind == "text"
    assert len(answered(load, once, task="labels").task.labels) == 12


def test_a_task_that_data_cannot_have_is_refused(load: Loader) -> None:
    with pytest.raises(UserError, match="has 1"):
        answered(load, {" good": 3, " good ": 3}, task="labels")
    with pytest.raises(UserError, match="holds conversations"):
        load([{"messages": [USER, says("yes")]}], objective="sft", task="labels")
    with pytest.raises(UserError, match="holds tokens"):
        load([{"input_ids": [3, 4], "labels": [-100, 4]}], objective="sft", task="answers")
    with pytest.raises(UserError, match="no meaning under `objective: dpo`"):
        load([{"prompt": "q", "chosen": "a", "rejected": "b"}], task="labels")


def test_a_label_that_only_validation_has_is_said(load: Loader) -> None:
    rows = [{"prompt": f"{n}:", "completion": (" a", " b")[n % 2]} for n in range(12)]
    (load.folder / "other.jsonl").write_text("".join('{"prompt": "x:", "completion": " c"}\n' for _ in range(3)))
    data = load(rows, objective="sft", validation_file=str(load.folder / "other.jsonl"))
    assert data.task.label_names == ("a", "b", "c")
    assert said(load, "labels of the validation data that no training example has: c")


def test_labels_that_differ_in_case_or_encoding_are_said(load: Loader) -> None:
    task = answered(load, {" yes": 20, " Yes": 20, " caf\u00e9": 20, " cafe\u0301": 20, " no": 20}).task
    assert len(task.labels) == 5
    [line] = said(load, "differ only in case")
    assert line.endswith(": Yes, yes, cafe\u0301, caf\u00e9")


def test_labels_that_the_validation_data_drowns_are_said(tokenizer: Any, make_settings: Any, tmp_path: Path) -> None:
    for name, texts in (("train", ["good", "bad"] * 15), ("valid", [f"text {number}" for number in range(40)])):
        rows = [{"prompt": f"row {number}:", "completion": text} for number, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines: list[str] = []
    data = load_data(
        make_settings(train_file=str(tmp_path / "train.jsonl"), validation_file=str(tmp_path / "valid.jsonl")),
        tokenizer,
        cache_folder=tmp_path / "cache",
        report=lines.append,
        progress=lambda phase, done, total: None,
        check_stop=lambda: None,
    )
    assert data.task.kind == "text"
    assert any("`train.jsonl` look like labels, and with those of the validation data there are 42 values" in line
               for line in lines)  # fmt: skip
