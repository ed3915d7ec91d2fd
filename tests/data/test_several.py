"""Several files in one run: each by its own form, repeated or thinned by its share, with a task of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_model import write_tiny_model
from trietune import UserError
from trietune.config import load_config
from trietune.data import PromptFormat, load_data
from trietune.data.encoder import load_tokenizer
from trietune.data.load import load_parts
from trietune.data.loaded_data import Data
from trietune.data.parts import draw_rows, metric_names, told_apart

Load = Callable[..., Data]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def arguments(tmp_path: Path, said: list[str]) -> dict[str, Any]:
    return {
        "cache_folder": tmp_path / "cache",
        "report": said.append,
        "progress": lambda *_: None,
        "check_stop": lambda: None,
    }


@pytest.fixture
def load(tokenizer: Any, arguments: dict[str, Any]) -> Load:
    return lambda **keys: load_data(settings_of(keys), tokenizer, **arguments)


def settings_of(keys: dict[str, Any]) -> Any:
    return load_config(None, {"max_length": 512, **keys}, environ={})


@pytest.fixture
def chats(tmp_path: Path) -> str:
    turns = [[("user", f"color {n}?"), ("assistant", f"red {n % 5}")] for n in range(12)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in one]} for one in turns]
    return write(tmp_path / "chats.jsonl", rows)


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\n" + "".join(f"film {n},{'good' if n % 2 else 'bad'}\n" for n in range(20)))
    return str(path)


def pairs(folder: Path, name: str, completions: list[str]) -> str:
    return write(folder / name, [{"prompt": f"{name} {n}:", "completion": c} for n, c in enumerate(completions)])


def write(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


OWN = {"prompt_template": "Review: {text}\nOutput:", "completion_template": " {label}"}


def test_each_file_is_read_by_its_own_form_and_measured_by_its_own_task(
    load: Load, chats: str, reviews: str, said: list[str], tokenizer: Any
) -> None:
    data = load(train_file=[chats, reviews], **OWN)
    texts = [tokenizer.decode(ids_of(data, index)) for index in range(len(data.train))]
    assert sum(text.startswith("<bos><user>color") for text in texts) == 11
    assert sum(text.startswith("<bos>Review: film") for text in texts) == 19
    assert [(part.name, len(part.sequences), part.prompt_format.task.kind) for part in data.parts] == [
        ("chats", 1, "text"),
        ("reviews", 1, "labels"),
    ]
    assert any("`chats.jsonl` is read by its own form: `prompt_template` asks for the column `text`" in s for s in said)
    assert any("the tasks differ (`chats.jsonl`: text, `reviews.csv`: labels)" in line for line in said)
    assert data.source_name == "chats.jsonl, reviews.csv"
    assert PromptFormat.from_json(data.prompt_format.to_json()) == data.prompt_format


def ids_of(data: Data, index: int) -> list[int]:
    train = data.train
    ids: list[int] = train.input_ids[train.offsets[index] : train.offsets[index + 1]].tolist()
    return ids


def test_a_list_of_one_is_that_file_and_has_its_fingerprint(load: Load, reviews: str) -> None:
    alone, listed = load(train_file=reviews, **OWN), load(train_file=[reviews], **OWN)
    assert alone.fingerprint == listed.fingerprint
    assert not listed.parts


@pytest.mark.parametrize(("share", "number"), [(1, 10), (2, 20), (0.5, 5), (1.5, 15), (0.25, 2), (3, 30)])
def test_a_share_repeats_or_thins(share: float, number: int) -> None:
    rows = draw_rows(10, share, seed=3, number=0, source="a.jsonl")
    assert len(rows) == number
    counts = np.bincount(rows, minlength=10)
    assert counts.max() - counts.min() <= 1
    assert (rows == draw_rows(10, share, seed=3, number=0, source="a.jsonl")).all()


def test_the_plan_says_what_becomes_of_each_file_and_copies_have_ids_of_their_own(load: Load, tmp_path: Path) -> None:
    a, b = (pairs(tmp_path, name, [f" {n}" for n in range(20)]) for name in ("a.jsonl", "b.jsonl"))
    data = load(train_file=[a, b], data_shares=[2, 0.5])
    assert data.lines == (
        "a.jsonl: 19 examples, 38 with a share of 2; 79% of an epoch",
        "b.jsonl: 10 of 19 examples, 9 left out by a share of 0.5; 21% of an epoch",
    )
    assert len(set(data.train.ids)) == len(data.train) == 48
    assert data.counts.train.kept == 48


def test_what_decides_the_tokens_decides_the_fingerprint(load: Load, tmp_path: Path) -> None:
    a, b = (pairs(tmp_path, name, [f" {n}" for n in range(20)]) for name in ("a.jsonl", "b.jsonl"))
    plain = load(train_file=[a, b])
    assert load(train_file=[a, b], data_shares=[1, 1], seed=9).fingerprint == plain.fingerprint
    others = [
        load(train_file=[b, a]),
        load(train_file=[a]),
        load(train_file=[a, b], data_shares=[2, 1]),
        load(train_file=[a, b], data_shares=[1, 0.5]),
        load(train_file=[a, b], data_shares=[1, 0.5], seed=9),
    ]
    prints = [plain.train_fingerprint, *(one.train_fingerprint for one in others)]
    assert len(set(prints)) == len(prints)


def test_files_of_one_name_are_told_apart_by_their_folders(load: Load, tmp_path: Path) -> None:
    a, b = (pairs(tmp_path / name, "train.jsonl", [f" {n}" for n in range(20)]) for name in ("a", "b"))
    data = load(train_file=[a, b])
    assert [part.name for part in data.parts] == ["a-train.jsonl", "b-train.jsonl"]
    assert {one.rsplit(":", 1)[0] for one in data.train.ids} == {"a/train.jsonl", "b/train.jsonl"}


def test_items_of_a_list_on_one_line_have_places_of_their_own(load: Load, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "completion": f" {n}"} for n in range(4)]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(rows[:3]).replace("}, {", "},\n{", 1))
    ids = list(load(train_file=str(path), validation_file=str(path)).train.ids)
    assert ids == ["list.json:1", "list.json:2", "list.json:2 item 2"]


def test_short_names_are_as_long_as_they_must_be() -> None:
    assert metric_names(["reviews.csv", "chats.jsonl.gz"]) == ("reviews", "chats")
    assert metric_names(["a.csv", "a.jsonl"]) == ("a.csv", "a.jsonl")
    assert metric_names(["x/train.csv", "y/train.csv"]) == ("x-train.csv", "y-train.csv")
    assert metric_names(["nyu-mll/glue (sst2)", "my set.csv"]) == ("glue-sst2", "my-set")
    assert told_apart(["/d/x/t.csv", "/d/y/t.csv", "/d/u.csv"]) == ("x/t.csv", "y/t.csv", "u.csv")


def test_labels_of_files_that_are_asked_alike_are_one_set(load: Load, tmp_path: Path, said: list[str]) -> None:
    a = pairs(tmp_path, "a.jsonl", [" good", " bad"] * 10)
    b = pairs(tmp_path, "b.jsonl", [" good", " dull"] * 10)
    data = load(train_file=[a, b])
    assert data.task.label_names == ("bad", "dull", "good")
    assert {part.prompt_format.task for part in data.parts} == {data.task}
    assert any("are asked alike, so their 3 labels are one set" in line for line in said)


def test_labels_beside_texts_of_one_form_are_measured_apart_and_asked_as_text(
    load: Load, tmp_path: Path, said: list[str]
) -> None:
    a = pairs(tmp_path, "a.jsonl", [" good", " bad"] * 10)
    b = pairs(tmp_path, "b.jsonl", [f" number {n}" for n in range(20)])
    data = load(train_file=[a, b])
    assert data.task.kind == "text"
    assert [part.prompt_format.task.kind for part in data.parts] == ["labels", "text"]
    assert any("have other tasks: `predict` writes answers" in line for line in said)


def test_validation_files_are_measured_each_by_the_form_of_the_training_file_that_is_like_it(
    load: Load, chats: str, reviews: str, tmp_path: Path
) -> None:
    valid = tmp_path / "valid.csv"
    valid.write_text("text,label\na,good\nb,dull\n")
    data = load(train_file=[chats, reviews], validation_file=[str(valid), chats], **OWN)
    assert [(one.name, len(one.sequences)) for one in data.parts] == [("valid", 2), ("chats", 12)]
    assert data.parts[0].prompt_format.task.label_names == ("bad", "dull", "good")
    assert len(data.train) == 32


def test_a_limit_takes_a_part_of_each_file(load: Load, tmp_path: Path) -> None:
    a = pairs(tmp_path, "a.jsonl", [f" {n}" for n in range(40)])
    b = pairs(tmp_path, "b.jsonl", [f" {n}" for n in range(20)])
    ids = list(load(train_file=[a, b], max_train_examples=9).train.ids)
    assert [sum(one.startswith(name) for one in ids) for name in ("a.jsonl", "b.jsonl")] == [6, 3]


def test_preferences_of_several_files_keep_their_rows(load: Load, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "chosen": " yes", "rejected": " no"} for n in range(10)]
    ranked = [{"prompt": f"r{n}", "completions": [" a", " b", " c"], "ranking": [0, 1, 2]} for n in range(10)]
    data = load(
        train_file=[write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", ranked)],
        data_shares=[2, 1],
        objective="dpo",
    )
    assert data.train.row_start is not None
    assert np.diff(data.train.row_start).tolist() == [2] * 18 + [3] * 9


def test_weights_of_one_file_leave_the_others_as_they_are(load: Load, tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [{"prompt": f"{n}", "completion": " x", "weight": 0.5} for n in range(10)])
    b = pairs(tmp_path, "b.jsonl", [" y"] * 10)
    data = load(train_file=[a, b])
    assert data.train.weights is not None
    assert set(data.train.weights.tolist()) == {0.5, 1.0}


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"data_shares": [0.001, 1]}, "a share of 0.001 leaves none of the 19 examples of `a.jsonl`"),
        ({"train_file": ["a.jsonl", "./a.jsonl"]}, "is trained on twice"),
        ({"train_file": ["a.jsonl", "missing.jsonl"]}, "there is no file or folder `missing.jsonl`"),
        ({"data_shares": [1, 2, 3]}, "has 3 numbers, and `train_file` names 2"),
        ({"train_file": ["a.jsonl", "a.jsonl"]}, "`a.jsonl` stands in it twice"),
        ({"dataset_id": ["x/y", "z/w"]}, "write all files and data sets as one list under `dataset_id`"),
    ],
)
def test_mistakes_in_the_lists_are_refused(
    keys: dict[str, Any], what: str, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        pairs(tmp_path, name, [f" {n}" for n in range(20)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load(**{"train_file": ["a.jsonl", "b.jsonl"], **keys})
    assert what in str(caught.value)


def test_a_broken_row_of_the_second_file_is_named_with_its_line(load: Load, tmp_path: Path) -> None:
    a = pairs(tmp_path, "a.jsonl", [" x"] * 5)
    b = Path(pairs(tmp_path, "b.jsonl", [" y"] * 5))
    b.write_text(b.read_text() + '{"prompt": "half\n')
    with pytest.raises(UserError, match=r"b\.jsonl:6"):
        load(train_file=[a, str(b)])


def test_an_adapter_of_several_forms_is_measured_on_each_by_its_own(
    load: Load, chats: str, reviews: str, tokenizer: Any, arguments: dict[str, Any]
) -> None:
    trained = load(train_file=[chats, reviews], **OWN).prompt_format
    kinds = {}
    for named in (chats, reviews, [reviews, chats]):
        settings = settings_of({"dataset_id": named, **(OWN if named != chats else {})})
        parts = load_parts(settings, tokenizer, None, prompt_format=trained, **arguments)
        kinds[str(named)] = [(len(one.sequences), one.prompt_format.kind, one.prompt_format.task.kind) for one in parts]
    assert kinds[chats] == [(12, "chat", "text")]
    assert kinds[reviews] == [(20, "template", "labels")]
    assert kinds[str([reviews, chats])] == [(20, "template", "labels"), (12, "chat", "text")]
