"""From settings to token sequences: sources, counts, rules and the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trietune.data import Data, load_data, load_split, preview_examples
from trietune.data.examples import IGNORED_LABEL, Message
from trietune.data.held_out import draw_held_out
from trietune.data.rows import FileRows
from trietune.errors import StopRequested, UserError

Load = Callable[..., Data]


@pytest.fixture
def said() -> list[str]:
    """What the last calls of `load` reported."""
    return []


@pytest.fixture
def load(tokenizer: Any, make_settings: Any, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Load:
    """`load(**settings)` in a folder of its own, with a cache of its own."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call(
        *, progress: Any = lambda *_: None, check_stop: Any = lambda: None, as_it_is: bool = False, **changes: Any
    ) -> Data:
        return load_data(
            make_settings(**(changes if as_it_is else say_sst2(changes))),
            tokenizer,
            cache_folder=tmp_path / "cache",
            report=said.append,
            progress=progress,
            check_stop=check_stop,
        )

    return call


def say_sst2(changes: dict[str, Any]) -> dict[str, Any]:
    """The same settings, saying that files with sentences are SST-2, as their columns alone do not."""
    named = changes.get("train_file") or changes.get("dataset_id")
    if not named or "prompt_template" in changes or {"train_file", "dataset_id"} <= set(changes):
        return changes
    files = [path for path in (Path(named), *Path(named).rglob("*")) if path.is_file()]
    if not any(b"sentence" in path.read_bytes() for path in files):
        return changes
    return {**changes, "train_file": named, "dataset_id": "sst2"}


def tsv(name: str, *rows: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("sentence\tlabel\n" + "".join(row + "\n" for row in rows))
    return name


def jsonl(name: str, rows: list[Any]) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def texts(data: Data, tokenizer: Any) -> list[str]:
    train = data.train
    pairs = zip(train.offsets[:-1], train.offsets[1:], strict=True)
    return [tokenizer.decode(train.input_ids[a:b], skip_special_tokens=True) for a, b in pairs]


def test_sst2_from_local_files(load: Load, tokenizer: Any) -> None:
    data = load(
        dataset_id="stanfordnlp/sst2",
        train_file=tsv("train.tsv", "a fine film\t1", "dull\t0"),
        validation_file=tsv("dev.tsv", "fine\t1"),
    )
    assert texts(data, tokenizer) == [
        'Review: a fine film\nOutput: {"label": "positive"}',
        'Review: dull\nOutput: {"label": "negative"}',
    ]
    assert list(data.train.ids) == ["train.tsv:2", "train.tsv:3"]
    assert data.train.examples[1].prompt == "Review: dull\nOutput:"
    assert data.train.examples[-1].id == "train.tsv:3"
    assert data.task.labels == (' {"label": "negative"}', ' {"label": "positive"}')
    assert data.task.label_names == ("negative", "positive")
    assert data.validation is not None
    assert len(data.validation) == 1
    assert not data.counts.held_out
    assert (data.train.input_ids.dtype, data.train.labels.dtype) == (np.int32, np.int32)
    assert data.train.offsets.dtype == np.int64


def squad_file(name: str, num_questions: int = 2) -> str:
    qas = [
        {"id": f"{name}-{i}", "question": f"question {i}?", "answers": [{"text": f"the {i}"}], "is_impossible": i % 2}
        for i in range(num_questions)
    ]
    Path(name).write_text(json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "C.", "qas": qas}]}]}))
    return name


def test_squad_from_local_files_by_any_name(load: Load, tokenizer: Any) -> None:
    train, dev = squad_file("a.json"), squad_file("b.json")
    expected = [
        "\nContext: C.\n\nQuestion: question 0?\n\nAnswer:\nthe 0",
        "\nContext: C.\n\nQuestion: question 1?\n\nAnswer:\nunanswerable",
    ]
    for dataset_id in ("squadv2", "squad_v2", "rajpurkar/squad_v2"):
        data = load(dataset_id=dataset_id, train_file=train, validation_file=dev)
        assert texts(data, tokenizer) == expected
    # The default of `dataset_id` is SST-2: it does not count against what the file itself says.
    assert texts(load(train_file=train, validation_file=dev), tokenizer) == expected
    assert data.task.kind == "answers"
    assert data.train.examples[0].answers == ("the 0",)
    assert data.train.examples[1].answers == ()
    assert list(data.train.ids) == ["a.json-0", "a.json-1"]


def test_ids_stay_unique_where_the_data_repeats_them(load: Load) -> None:
    Path("parts").mkdir()
    for name in ("one", "two"):
        squad_file(f"parts/{name}.json")
        Path(f"parts/{name}.json").write_text(Path(f"parts/{name}.json").read_text().replace(f"parts/{name}", "same"))
    data = load(dataset_id="squadv2", train_file="parts/*.json", validation_file=squad_file("dev.json"))
    assert list(data.train.ids) == ["same.json-0", "same.json-1", "two.json question 1", "two.json question 2"]


def test_a_file_that_is_not_the_named_data_set_is_refused(load: Load) -> None:
    with pytest.raises(UserError, match=r"`sentence`, `label` missing in `a.json`"):
        load(dataset_id="sst2", train_file=squad_file("a.json"))


@pytest.mark.parametrize("form", ["tsv", "csv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("names", [("train", "validation"), ("train", "valid"), ("train-00000-of-00001", "dev")])
def test_a_folder_of_splits(load: Load, form: str, names: tuple[str, str]) -> None:
    rows = [{"sentence": f"film {i}", "label": i % 2} for i in range(4)]
    Path("folder").mkdir()
    for name in (*names, "test"):
        path = Path(f"folder/{name}.{form}")
        if form in ("tsv", "csv"):
            mark = "\t" if form == "tsv" else ","
            path.write_text(f"sentence{mark}label\n" + "".join(f"{r['sentence']}{mark}{r['label']}\n" for r in rows))
        elif form == "jsonl":
            jsonl(str(path), rows)
        elif form == "json":
            path.write_text(json.dumps(rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
    Path("folder/README.md").write_text("not data")
    for key in ("dataset_id", "train_file"):
        data = load(**{key: "folder"})
        assert data.validation is not None
        assert (len(data.train), len(data.validation)) == (4, 4)
        assert data.train.examples[1].prompt == "Review: film 1\nOutput:"
        assert not data.counts.held_out


def test_a_folder_with_a_folder_for_each_split(load: Load) -> None:
    jsonl("d/train/a.jsonl", [{"text": "a"}])
    jsonl("d/train/b.jsonl", [{"text": "b"}])
    jsonl("d/dev/a.jsonl", [{"text": "c"}])
    data = load(dataset_id="d")
    assert list(data.train.ids) == ["a.jsonl:1", "b.jsonl:1"]
    assert data.counts.train.source == "a.jsonl and 1 more"


def test_a_split_in_two_forms_is_ambiguous(load: Load) -> None:
    tsv("d/train.tsv", "fine\t1")
    jsonl("d/train.jsonl", [{"text": "x"}])
    with pytest.raises(UserError, match=r"several forms: \.jsonl, \.tsv"):
        load(dataset_id="d")


def test_files_of_one_name_are_told_apart(load: Load) -> None:
    jsonl("a/x.jsonl", [{"text": "a"}])
    jsonl("b/x.jsonl", [{"text": "b"}])
    assert list(load(train_file="*/x.jsonl", validation_file="a/x.jsonl").train.ids) == ["a/x.jsonl:1", "b/x.jsonl:1"]


@pytest.mark.parametrize(
    ("changes", "message", "advice"),
    [
        ({"train_file": "trian.tsv"}, "no file or folder `trian.tsv`", "did you mean `train.tsv`?"),
        ({"train_file": "nothing/*.tsv"}, "finds no file", "GLUE TSV"),
        ({"dataset_id": "./missing"}, "no file or folder `missing`", "check the path"),
        ({"dataset_id": "missing.jsonl"}, "no file or folder `missing.jsonl`", "check the path"),
        ({"dataset_id": "empty"}, "holds no data files", "GLUE TSV"),
        ({"dataset_id": "sst-2"}, "no data set `sst-2`", "did you mean `sst2`?"),
        ({"dataset_id": "squad2"}, "no data set `squad2`", "did you mean `squad"),
        ({"train_file": "train.tsv", "dataset_split": "tain"}, "has no split `tain`", "dataset_split: train"),
        ({"train_file": "train.tsv", "dataset_split": "train[9:]"}, "holds no rows", "lies inside"),
        ({"train_file": "train.tsv", "dataset_split": "train[a:b]"}, "is not a split", "train"),
        ({"train_file": "header.tsv"}, "`header.tsv` holds no rows", "check that the file"),
        ({"train_file": "train.tsv", "chat_template": "{{ x }}"}, "no conversations", "messages"),
    ],
)
def test_a_source_that_is_not_there(load: Load, changes: Any, message: str, advice: str) -> None:
    tsv("train.tsv", "fine\t1")
    tsv("header.tsv")
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        load(**changes)
    assert advice in str(caught.value)


def test_a_slice_of_the_training_split(load: Load) -> None:
    rows = [f"film {i}\t1" for i in range(10)]
    dev = tsv("dev.tsv", "fine\t1")
    for split, expected in (("train[:2]", [2, 3]), ("train[50%:70%]", [7, 8]), ("train[8:]", [10, 11])):
        data = load(train_file=tsv("t.tsv", *rows), validation_file=dev, dataset_split=split)
        assert list(data.train.ids) == [f"t.tsv:{line}" for line in expected]


def test_only_the_first_training_examples_are_taken(load: Load) -> None:
    train = tsv("t.tsv", *(f"film {i}\t1" for i in range(10)))
    data = load(train_file=train, validation_file=tsv("dev.tsv", "fine\t1"), max_train_examples=3)
    assert list(data.train.ids) == ["t.tsv:2", "t.tsv:3", "t.tsv:4"]
    assert data.counts.train.read == 3


def test_validation_is_held_out_of_custom_data_and_never_trained_on(load: Load, said: list[str]) -> None:
    train = jsonl("t.jsonl", [{"text": f"text {i}"} for i in range(100)])
    data = load(dataset_id=train)
    assert data.validation is not None
    assert len(data.validation) == 5
    assert set(data.train.ids).isdisjoint(data.validation.ids)
    assert len(data.train) == 95
    assert data.counts.held_out
    assert any("5 of 100 rows of `t.jsonl` are held out" in line for line in said)
    again = load(dataset_id=train)
    assert again.validation is not None
    assert list(again.validation.ids) == list(data.validation.ids)


def test_one_example_alone_is_trained_without_validation(load: Load, said: list[str]) -> None:
    data = load(dataset_id=jsonl("t.jsonl", [{"text": "alone"}]))
    assert data.validation is None
    assert len(data.train) == 1
    assert any("too small" in line for line in said)


def test_a_limit_counts_what_is_not_held_out(load: Load) -> None:
    train = jsonl("t.jsonl", [{"text": f"text {i}"} for i in range(100)])
    everything, some = load(dataset_id=train).train, load(dataset_id=train, max_train_examples=50).train
    assert list(some.ids) == list(everything.ids)[:50]
    assert len(load(dataset_id=train, max_train_examples=1000).train) == 95


def test_how_much_is_held_out() -> None:
    assert [int(draw_held_out(n).sum()) for n in (0, 1, 2, 20, 100, 1_000_000)] == [0, 0, 1, 1, 5, 1000]


def test_overlong_examples_are_left_out_and_counted(load: Load, said: list[str]) -> None:
    long = " ".join(["film"] * 60)
    train, dev = tsv("t.tsv", "fine\t1", f"{long}\t0", f"{long}\t1"), tsv("dev.tsv", f"{long}\t0")
    data = load(train_file=train, validation_file=dev, max_length=60)
    assert list(data.train.ids) == ["t.tsv:2"]
    assert data.counts.train.overlong.number == 2
    assert data.counts.train.overlong.samples == ("t.tsv:3", "t.tsv:4")
    assert "training: 2 longer than `max_length: 60`, left out (t.tsv:3, t.tsv:4)" in said
    assert data.validation is not None
    assert len(data.validation) == 1
    assert np.diff(data.validation.offsets)[0] > 60
    assert any("kept: validation drops nothing" in line for line in said)


def test_prompts_are_cut_at_their_left_and_labels_never(load: Load, tokenizer: Any, said: list[str]) -> None:
    train = tsv("t.tsv", "fine\t1", " ".join(f"film{i}" for i in range(60)) + "\t0")
    dev = tsv("dev.tsv", "fine\t1")
    whole = load(train_file=train, validation_file=dev, max_length=1000).train
    cut = load(train_file=train, validation_file=dev, max_length=60, overlong="truncate_prompt").train
    assert np.diff(cut.offsets).max() == 60
    start, end = whole.offsets[1:3]
    ids, labels = cut.input_ids[cut.offsets[1] :], cut.labels[cut.offsets[1] :]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[1:].tolist() == whole.input_ids[start:end][-59:].tolist()
    assert labels[labels != IGNORED_LABEL].tolist() == [one for one in whole.labels[start:end] if one != IGNORED_LABEL]
    assert "training: 1 longer than `max_length: 60`, cut at the left of the prompt (t.tsv:3)" in said


def test_what_its_completion_alone_makes_too_long_cannot_be_cut(load: Load) -> None:
    rows = [{"prompt": "p " * 50, "completion": " long" * 50}, {"prompt": "a", "completion": " b"}]
    dev = jsonl("dev.jsonl", rows[1:])
    data = load(train_file=jsonl("t.jsonl", rows), validation_file=dev, max_length=40, overlong="truncate_prompt")
    assert list(data.train.ids) == ["t.jsonl:2"]
    assert (data.counts.train.overlong.number, data.counts.train.truncated.number) == (1, 0)


def test_overlong_error_counts_all_of_them(load: Load) -> None:
    train = tsv("t.tsv", *("film " * 60 + "\t1" for _ in range(5000)), "fine\t1")
    with pytest.raises(UserError, match=r"5,000 of 5,001 rows of `t.tsv` are too long") as caught:
        load(train_file=train, validation_file=tsv("dev.tsv", "x\t1"), max_length=60, overlong="error")
    assert "t.tsv:2: " in str(caught.value)
    assert "and 4,990 more" in str(caught.value)


def test_nothing_left_is_an_error(load: Load) -> None:
    train = tsv("t.tsv", "a fine film and a moving one\t1")
    with pytest.raises(UserError, match=r"all 1 examples of `t.tsv` are longer than `max_length: 5`"):
        load(train_file=train, validation_file=tsv("dev.tsv", "x\t1"), max_length=5)
    empty = jsonl("e.jsonl", [{"prompt": "p", "completion": ""}])
    with pytest.raises(UserError, match="completions are empty"):
        load(train_file=empty, validation_file=empty)


def test_broken_lines_stop_and_all_are_counted(load: Load) -> None:
    lines = ['{"text": "fine"}', "{broken", *['{"text": "fine"}'] * 5000, "[1]", "{broken"]
    Path("t.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"3 of 5,004 rows of `t.jsonl` cannot be used") as caught:
        load(train_file="t.jsonl", validation_file="t.jsonl")
    for place in ("t.jsonl:2: not JSON", "t.jsonl:5003: a JSON value", "t.jsonl:5004: not JSON"):
        assert place in str(caught.value)


def test_the_first_ten_broken_lines_are_named(load: Load) -> None:
    train = tsv("t.tsv", *("fine\t7" for _ in range(25)))
    with pytest.raises(UserError, match="25 of 25 rows") as caught:
        load(train_file=train)
    assert str(caught.value).count("t.tsv:") == 10
    assert "and 15 more" in str(caught.value)


def test_a_test_split_has_no_labels(load: Load) -> None:
    with pytest.raises(UserError, match=r"2 of 2 rows of `test.tsv` have no label") as caught:
        load(train_file=tsv("test.tsv", "fine\t-1", "dull\t-1"))
    assert "validation" in str(caught.value)


def test_empty_and_equal_examples_are_counted(load: Load, said: list[str]) -> None:
    rows = [
        {"prompt": "p", "completion": " c"},
        {"prompt": "", "completion": " c"},
        {"prompt": "p", "completion": " "},
        {"prompt": "p", "completion": " c"},
    ]
    data = load(train_file=jsonl("t.jsonl", rows), validation_file=jsonl("v.jsonl", rows))
    counts = data.counts.train
    assert (counts.read, counts.kept) == (4, 3)
    assert counts.without_completion.samples == ("t.jsonl:3",)
    assert counts.without_prompt.samples == ("t.jsonl:2",)
    assert counts.duplicates.samples == ("t.jsonl:4",)
    assert data.validation is not None
    assert len(data.validation) == 4
    assert "training: 1 without a completion, left out (t.jsonl:3)" in said
    assert "training: 1 equal to an earlier one, kept (t.jsonl:4)" in said


def test_an_empty_sentence_is_counted_and_kept(load: Load) -> None:
    counts = load(train_file=tsv("t.tsv", " \t1", "fine\t1"), validation_file=tsv("d.tsv", "x\t1")).counts.train
    assert counts.without_prompt.samples == ("t.tsv:2",)
    assert counts.kept == 2


def test_few_short_completions_are_labels(load: Load, said: list[str]) -> None:
    rows = [{"q": f"question {i}", "a": ("yes", "no", "maybe")[i % 3]} for i in range(60)]
    keys = {"prompt_template": "{q}?", "completion_template": " {a}"}
    data = load(dataset_id=jsonl("t.jsonl", rows), **keys)
    assert data.task.kind == "labels"
    assert data.task.labels == (" maybe", " no", " yes")
    assert data.task.label_names == ("maybe", "no", "yes")
    assert data.prompt_format.task == data.task
    assert any("completions take 3 values (maybe, no, yes)" in line for line in said)
    varied = [{"q": "q", "a": f"answer {i}"} for i in range(60)]
    assert load(dataset_id=jsonl("u.jsonl", varied), **keys).task.kind == "text"


def test_a_label_that_only_validation_has_is_one_of_the_labels(load: Load) -> None:
    train = jsonl("t.jsonl", [{"prompt": "p", "completion": one} for one in (" yes", " no") * 5])
    dev = jsonl("v.jsonl", [{"prompt": "p", "completion": " perhaps"}])
    assert load(train_file=train, validation_file=dev).task.label_names == ("no", "perhaps", "yes")


def test_conversations(load: Load) -> None:
    turns = [{"role": role, "content": f"{role} text"} for role in ("user", "assistant") * 2]
    path = jsonl("t.jsonl", [{"messages": turns}] * 2)
    data = load(train_file=path, validation_file=path)
    assert data.train.examples[0].messages[0] == Message("user", "user text")
    assert data.prompt_format.kind == "chat"
    assert "<start_of_turn>" in data.prompt_format.chat_template
    own = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    Path("own.jinja").write_text(own)
    for chat_template in (own, "own.jinja"):
        assert (
            load(train_file=path, validation_file=path, chat_template=chat_template).prompt_format.chat_template == own
        )
    with pytest.raises(UserError, match="neither a template nor a file"):
        load(train_file=path, validation_file=path, chat_template="missing.jinja")


def test_turns_that_the_template_rewrites_become_examples(load: Load, said: list[str]) -> None:
    rewriting = (
        "{% for m in messages %}<start_of_turn>{{ m.role }} "
        "{% if m.role == 'assistant' and loop.last %}thought {% endif %}{{ m.content }}<end_of_turn>{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>assistant {% endif %}"
    )
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    path = jsonl("t.jsonl", [{"messages": turns}])
    data = load(train_file=path, validation_file=path, chat_template=rewriting)
    assert list(data.train.ids) == ["t.jsonl:1 turn 1", "t.jsonl:1 turn 2"]
    assert [data.train.examples[i].completion for i in range(2)] == ["assistant 0", "assistant 1"]
    assert any(line.startswith("training: 2 of 2 examples in 1 conversations of t.jsonl") for line in said)


def test_a_conversation_that_the_template_refuses_is_located(load: Load) -> None:
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = jsonl("t.jsonl", [{"messages": good}, {"messages": [{"role": "system", "content": "s"}, *good]}])
    with pytest.raises(UserError, match=r"1 of 2 rows of `t.jsonl`") as caught:
        load(train_file=path, validation_file=path)
    assert "t.jsonl:2: the chat template refuses it: System role not supported" in str(caught.value)


def test_data_that_brings_its_own_labels(load: Load, tokenizer: Any) -> None:
    ids = tokenizer.encode("a fine film")
    rows = [{"input_ids": ids, "labels": [-1] * 3 + ids[3:]}]
    path = jsonl("t.jsonl", rows)
    data = load(train_file=path, validation_file=path, ignored_index=-1)
    assert data.train.input_ids.tolist() == ids
    assert data.train.labels.tolist() == [IGNORED_LABEL] * 3 + ids[3:]
    assert data.train.examples[0].completion.endswith("film")
    with pytest.raises(UserError, match="token -1 is outside the vocabulary") as caught:
        load(train_file=path, validation_file=path)
    assert "t.jsonl:1" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": [1, 2], "labels": [1]}, "2 `input_ids` and 1 `labels`"),
        ({"input_ids": [1, 2.5], "labels": [1, 2]}, "whole numbers"),
        ({"input_ids": [1, 10**9], "labels": [1, 2]}, "outside the vocabulary"),
    ],
)
def test_wrong_tokens_are_located(load: Load, row: Any, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        load(train_file=jsonl("t.jsonl", [row]), validation_file="t.jsonl")
    assert f"t.jsonl:1: {reason}" in str(caught.value) or reason in str(caught.value)


def test_a_stop_leaves_nothing_half_written(load: Load, tmp_path: Path) -> None:
    train = tsv("t.tsv", *(f"film {i}\t1" for i in range(10_000)))
    seen: list[tuple[str, int, int | None]] = []

    def stop_in_the_second_block() -> None:
        if seen:
            raise StopRequested("SIGINT", 130)

    with pytest.raises(StopRequested):
        load(
            train_file=train,
            validation_file=train,
            progress=lambda *event: seen.append(event),
            check_stop=stop_in_the_second_block,
        )
    assert seen == [("tokenizing training data", 4096, 10_000)]
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_progress_knows_the_total_where_it_is_free(load: Load) -> None:
    seen: list[tuple[str, int, int | None]] = []
    rows = [{"text": f"text {i}"} for i in range(100)]
    load(dataset_id=jsonl("t.jsonl", rows), progress=lambda *event: seen.append(event))
    assert seen == [("tokenizing training data", 95, 95), ("tokenizing validation data", 5, 5)]
    seen.clear()
    train = jsonl("u.jsonl", rows)
    load(train_file=train, validation_file=train, max_train_examples=20, progress=lambda *event: seen.append(event))
    assert [total for _, _, total in seen] == [20, 100]
    Path("v.csv").write_text("text\nfine\n")
    seen.clear()
    load(train_file="v.csv", validation_file="v.csv", progress=lambda *event: seen.append(event))
    assert [total for _, _, total in seen] == [None, None]


def test_one_split_for_evaluation(load: Load, tokenizer: Any, make_settings: Any, tmp_path: Path) -> None:
    tsv("d/train.tsv", "a\t1")
    tsv("d/dev.tsv", "b\t1")
    tsv("d/test.tsv", "c\t1")
    data = load(dataset_id="d")
    calls: dict[str, Any] = {
        "cache_folder": tmp_path / "cache",
        "report": lambda _: None,
        "progress": lambda *_: None,
        "check_stop": lambda: None,
    }
    for split, text in (("train", "a"), ("validation", "b"), ("test", "c")):
        sequences, used = load_split(make_settings(**say_sst2({"dataset_id": "d"})), tokenizer, split, **calls)  # type: ignore[arg-type]
        assert sequences.examples[0].prompt == f"Review: {text}\nOutput:"
        assert used == data.prompt_format
    Path("d/test.tsv").unlink()
    with pytest.raises(UserError, match="without a test split"):
        load_split(make_settings(**say_sst2({"dataset_id": "d"})), tokenizer, "test", **calls)
    own = load(dataset_id="d", prompt_template="Say {sentence}:", completion_template=" {label}").prompt_format
    sequences, used = load_split(
        make_settings(**say_sst2({"dataset_id": "d"})), tokenizer, "validation", prompt_format=own, **calls
    )
    assert sequences.examples[0].prompt == "Say b:"
    assert used == own


def test_an_adapter_is_evaluated_on_the_form_that_it_was_trained_on(
    load: Load, tokenizer: Any, make_settings: Any, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = load(train_file=jsonl("chat.jsonl", [{"messages": turns}] * 3)).prompt_format
    said: list[str] = []
    calls: dict[str, Any] = {
        "cache_folder": tmp_path / "cache",
        "report": said.append,
        "progress": lambda *_: None,
        "check_stop": lambda: None,
    }
    settings = make_settings(dataset_id="sst2", train_file=tsv("t.tsv", *["fine\t1"] * 3))
    with pytest.raises(UserError, match=r"trained on conversations, and `t.tsv` holds prompts"):
        load_split(settings, tokenizer, "validation", prompt_format=chat, **calls)
    own = load(train_file="t.tsv").prompt_format
    load_split(settings, tokenizer, "validation", prompt_format=replace(own, tokenizer_hash="another"), **calls)
    assert any("tokenizer is not the one" in line for line in said)


def test_a_base_model_is_measured_on_labels_that_the_data_shows(
    load: Load, tokenizer: Any, make_settings: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": f"q{i}", "completion": one} for i in range(5) for one in (" yes", " no")]
    settings = make_settings(train_file=jsonl("t.jsonl", rows), validation_file="t.jsonl")
    _, used = load_split(
        settings,
        tokenizer,
        "validation",
        cache_folder=tmp_path / "cache",
        report=lambda _: None,
        progress=lambda *_: None,
        check_stop=lambda: None,
    )
    assert used.task.labels == (" no", " yes")


def test_a_preview_marks_the_labels(load: Load, tokenizer: Any) -> None:
    data = load(train_file=tsv("t.tsv", "fine\t1", "dull\t0"), validation_file=tsv("d.tsv", "x\t1"))
    shown = preview_examples(data.train, tokenizer, count=3)
    assert [one.id for one in shown] == ["t.tsv:2", "t.tsv:3"]
    assert "".join(token.text for token in shown[0].tokens if token.is_label) == ' {"label": "positive"}<eos>'
    assert "".join(token.text for token in shown[0].tokens if not token.is_label) == "<bos>Review: fine\nOutput:"


def token_rows(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {"train_file": jsonl("tokens.jsonl", rows), "validation_file": jsonl("v.jsonl", TOKENS_UNPADDED)}


TOKENS_UNPADDED: list[dict[str, Any]] = [
    {"input_ids": [10, 11, 12, 13], "labels": [-100, -100, 12, 13]},
    {"input_ids": [10, 14, 15], "labels": [-100, 14, 15]},
]


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_that_a_mask_hides_is_no_part_of_an_example(load: Load, said: list[str], side: str) -> None:
    plain = load(**token_rows(TOKENS_UNPADDED)).train
    before, after = {"left": (3, 0), "right": (0, 3), "both": (1, 2)}[side]
    padded = []
    for row in TOKENS_UNPADDED:
        ids = [0] * before + row["input_ids"] + [0] * after
        # The labels of padding equal its ids: without the mask it would be learned.
        labels = [0] * before + row["labels"] + [0] * after
        mask = [0] * before + [1] * len(row["labels"]) + [0] * after
        padded.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    data = load(**token_rows(padded))
    assert data.train.input_ids.tolist() == plain.input_ids.tolist()
    assert data.train.labels.tolist() == plain.labels.tolist()
    assert data.counts.train.padded.number == 2
    assert any("hides padding" in line for line in said)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"attention_mask": [1, 0, 1]}, "between others"),
        ({"attention_mask": [1, 1]}, "2 values of `attention_mask`"),
        ({"attention_mask": [1, 2, 1]}, "0 and 1"),
        ({"attention_mask": 1}, "`attention_mask` must be a list"),
        ({"labels": 1}, "`labels` must be a list"),
        ({"labels": "abc"}, "`labels` must be a list"),
        ({"input_ids": {"a": 1}}, "`input_ids` must be a list"),
        ({"input_ids": [[10], [11], [12]]}, "`input_ids` must be a list"),
        ({"input_ids": [True, 11, 12]}, "`input_ids` must be a list"),
    ],
)
def test_tokens_that_are_none_are_named(load: Load, row: dict[str, Any], reason: str) -> None:
    rows = [*TOKENS_UNPADDED, {"input_ids": [10, 11, 12], "labels": [-100, 11, 12], **row}]
    with pytest.raises(UserError, match="1 of 3 rows") as caught:
        load(**token_rows(rows))
    assert reason in str(caught.value)
    assert "tokens.jsonl:3" in str(caught.value)


def test_rows_without_a_label_are_left_out_and_counted(load: Load, said: list[str]) -> None:
    nothing: list[dict[str, Any]] = [
        {"input_ids": [10, 11], "labels": [-100, -100]},
        {"input_ids": None, "labels": None},
        {"input_ids": [], "labels": []},
        {"input_ids": [10], "labels": [10]},  # nothing comes before a first token
    ]
    data = load(**token_rows([nothing[0], *TOKENS_UNPADDED, *nothing[1:]]))
    assert len(data.train) == 2
    assert data.counts.train.without_labels.number == 4
    assert any("4 without a label, left out (tokens.jsonl:1, tokens.jsonl:4" in line for line in said)
    with pytest.raises(UserError, match=r"none of the 4 rows of `tokens\.jsonl` has a label"):
        load(**token_rows(nothing))
    with pytest.raises(UserError, match=r"none of the 1 rows of `n\.jsonl` has a label"):
        load(train_file=jsonl("t.jsonl", TOKENS_UNPADDED), validation_file=jsonl("n.jsonl", nothing[:1]))


def test_data_without_such_rows_keeps_the_fingerprint_that_checkpoints_know(load: Load) -> None:
    plain = load(**token_rows(TOKENS_UNPADDED))
    masked = load(**token_rows([{**row, "attention_mask": [1] * len(row["labels"])} for row in TOKENS_UNPADDED]))
    assert masked.counts.train.padded.number == 0
    some = load(**token_rows([*TOKENS_UNPADDED, {"input_ids": [10], "labels": [-100]}]))
    assert len({plain.train_fingerprint, masked.train_fingerprint, some.train_fingerprint}) == 3


def test_a_missing_number_is_no_text(load: Load, tokenizer: Any, said: list[str]) -> None:
    Path("n.jsonl").write_text(
        '{"prompt": "a note:", "completion": NaN}\n{"prompt": NaN, "completion": " b"}\n'
        '{"prompt": "c", "completion": " d"}\n'
    )
    data = load(train_file="n.jsonl", validation_file=jsonl("v.jsonl", [{"prompt": "a", "completion": "b"}]))
    assert texts(data, tokenizer) == [" b", "c d"]
    assert data.counts.train.without_completion.number == data.counts.train.without_prompt.number == 1
    table = pa.table({"film": ["a", "b", "c"], "stars": pa.array([1.5, float("nan"), 2.0])})
    pq.write_table(table, "n.parquet")
    templates = {"prompt_template": "{film}", "completion_template": " {stars}"}
    kept = load(train_file="n.parquet", validation_file="n.parquet", **templates)
    assert texts(kept, tokenizer) == ["a 1.5", "c 2.0"]
    Path("i.jsonl").write_text('{"prompt": "a", "completion": Infinity}\n{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match="1 of 2 rows"):
        load(train_file="i.jsonl")


SURROGATE = "smile \ud83d"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": SURROGATE, "completion": " b"},
        {"prompt": "a", "completion": SURROGATE},
        {"text": SURROGATE},
        {"messages": [{"role": "user", "content": SURROGATE}, {"role": "assistant", "content": "b"}]},
        {"id": "1", "context": SURROGATE, "question": "b", "answers": {"text": ["c"], "answer_start": [0]}},
        {"id": SURROGATE, "context": "a", "question": "b", "answers": {"text": ["c"], "answer_start": [0]}},
        {"id": "1", "context": "a", "question": "b", "answers": {"text": ["c", SURROGATE], "answer_start": [0, 0]}},
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_half_a_character_is_named_with_its_row(load: Load, row: dict[str, Any], form: str) -> None:
    Path(f"s.{form}").write_text(json.dumps([row]) if form == "json" else json.dumps(row) + "\n")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}" if "messages" in row else None
    with pytest.raises(UserError, match="half a character") as caught:
        load(train_file=f"s.{form}", chat_template=template)
    assert f"s.{form}:1" in str(caught.value)
    assert "ud83d" in str(caught.value)


@pytest.mark.parametrize("form", ["jsonl", "json", "squad.json"])
def test_json_that_is_nested_too_deeply_is_no_bug(load: Load, form: str) -> None:
    deep = "[" * 200_000 + "]" * 200_000
    text = {
        "jsonl": f'{{"prompt": {deep}}}\n',
        "json": f'[{{"prompt": {deep}}}]',
        "squad.json": f'{{"data": {deep}, "paragraphs": 1}}',
    }[form]
    Path(f"deep.{form}").write_text(text)
    with pytest.raises(UserError, match="nested too deeply"):
        load(train_file=f"deep.{form}", prompt_template="{prompt}", completion_template="{prompt}")


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"sentence": "They drank.", "label": 1}, "`dataset_id: sst2`"),
        ({"idx": 1, "sentence": "They drank.", "label": 1}, "`dataset_id: sst2`"),
        ({"context": "a", "question": "b", "answers": "c"}, "`dataset_id: squad_v2`"),
        ({"context": "a", "question": "b", "answers": ["c"]}, "`dataset_id: squad_v2`"),
    ],
)
def test_columns_alone_make_no_file_sst2_or_squad(load: Load, row: dict[str, Any], advice: str) -> None:
    name = jsonl("plain.jsonl", [row] * 9)
    for key in ("train_file", "dataset_id"):
        with pytest.raises(UserError, match="it is not clear what to learn") as caught:
            load(as_it_is=True, **{key: name})
        assert advice in str(caught.value)
        assert caught.value.exit_code == 2
    assert load(train_file=name, dataset_id="sst2" if "label" in row else "squad_v2").task.kind != "text"
    first, second = list(row)[-2:]
    other = load(train_file=name, prompt_template=f"{{{first}}}", completion_template=f" a {{{first}}} {second}")
    assert other.task.kind == "text"


def test_squads_own_form_says_what_it_is(load: Load) -> None:
    row = {"context": "a", "question": "b", "answers": {"text": ["c"], "answer_start": [0]}}
    assert load(train_file=jsonl("own.jsonl", [row] * 3)).task.kind == "answers"
    assert load(train_file=squad_file("own.json")).task.kind == "answers"


def test_columns_that_nothing_uses_are_named_once(load: Load, said: list[str]) -> None:
    rows = [{"prompt": "a", "completion": f"b{i}", "topic": "c", "year": i} for i in range(30)]
    load(train_file=jsonl("t.jsonl", rows))
    assert [line for line in said if "nothing uses" in line] == [
        "columns of `t.jsonl` that nothing uses: `topic`, `year`"
    ]
    said.clear()
    load(train_file="t.jsonl", prompt_template="{prompt} {topic} {year}", completion_template="{completion}")
    assert not [line for line in said if "nothing uses" in line]


def test_a_row_of_another_form_than_the_first_is_named(load: Load) -> None:
    forms: list[dict[str, Any]] = [
        {"text": "a"},
        {"prompt": "a", "completion": "b", "text": None},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "text": "a"},
        {"input_ids": [10, 11], "labels": [10, 11], "text": "a"},
    ]
    for row in forms[1:]:
        with pytest.raises(UserError, match="1 of 3 rows") as caught:
            load(train_file=jsonl("t.jsonl", [forms[0], forms[0], row]))
        assert "t.jsonl:3" in str(caught.value)
        assert "the first row of the data `text`" in str(caught.value)
    data = load(train_file=jsonl("t.jsonl", [{"text": "a", "prompt": None}, {"text": "b", "messages": None}]))
    assert data.counts.train.read + 1 == 2


def test_a_file_beside_the_split_is_no_part_of_it(load: Load, said: list[str]) -> None:
    rows = [{"prompt": "a", "completion": " b"}]
    jsonl("d/train.jsonl", rows * 3)
    jsonl("d/dev.jsonl", rows)
    for other in ("train_backup", "train-old", "training2_x", "train.bak", "dev_old"):
        jsonl(f"d/{other}.jsonl", rows * 5)
    data = load(train_file="d")
    assert (data.counts.train.read, len(data.validation or ())) == (3, 1)
    [of_train] = [line for line in said if "beside `train.jsonl`" in line]
    assert "`train_backup.jsonl`" in of_train
    assert "`train.bak.jsonl`" in of_train
    for shard in ("train-00000-of-00002", "train-00001-of-00002-0123456789abcdef", "train_3", "train.part4"):
        jsonl(f"shards/{shard}.jsonl", rows * 5)
    jsonl("shards/validation.jsonl", rows)
    assert load(train_file="shards").counts.train.read == 20
    jsonl("one/train_v2.jsonl", rows * 4)
    jsonl("one/validation.jsonl", rows)
    assert load(train_file="one").counts.train.read == 4
    jsonl("one/train_v3.jsonl", rows)
    with pytest.raises(UserError, match="several files could be the split `train`"):
        load(train_file="one")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_chat_template_may_begin_with_a_byte_order_mark(load: Load, tokenizer: Any, mark: bytes) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    Path("chat.jinja").write_bytes(mark + template.encode())
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = load(train_file=jsonl("c.jsonl", [{"messages": chat}] * 2), chat_template="chat.jinja")
    assert texts(data, tokenizer)[0] == "[user]a[assistant]b"
    Path("chat.jinja").write_bytes(b"\xff\xfe" + template.encode())
    with pytest.raises(UserError, match="not UTF-8 text"):
        load(train_file="c.jsonl", chat_template="chat.jinja")


CONVERSATION = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "r"},
]
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (TURNS + "{% if add_generation_prompt %}<assistant><think>\n{% endif %}", "asks for an answer"),
        ("{% for m in messages %}{{ m.content }", "line 1 of the template"),
        ("{% for t in tools %}{{ t }}{% endfor %}" + TURNS, "TypeError"),
        ("{{ 'n' + 1 }}" + TURNS, "TypeError"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_no_bug(load: Load, template: str, reason: str) -> None:
    name = jsonl("c.jsonl", [{"messages": CONVERSATION}] * 3)
    with pytest.raises(UserError, match="the chat template cannot be used") as caught:
        load(train_file=name, chat_template=template + "{# {{ #}")
    assert reason in str(caught.value)


def test_a_chat_template_is_probed_with_a_conversation_of_the_data(load: Load, tokenizer: Any) -> None:
    for demand in ("messages[0].role == 'system'", "messages[0].content == 's'"):
        template = "{% if not (" + demand + ") %}{{ raise_exception('a system message first') }}{% endif %}" + TURNS
        template += "{% if add_generation_prompt %}<assistant>{% endif %}"
        data = load(train_file=jsonl("c.jsonl", [{"messages": CONVERSATION}] * 3), chat_template=template)
        assert texts(data, tokenizer)[0] == "<system>s<user>q<assistant>r"
        plain = [{"messages": CONVERSATION}, {"messages": CONVERSATION[1:]}]
        with pytest.raises(UserError, match="1 of 2 rows") as caught:
            load(train_file=jsonl("d.jsonl", plain), chat_template=template)
        assert "a system message first" in str(caught.value)


def test_a_conversation_that_begins_with_the_assistant_is_named(load: Load) -> None:
    rows = [{"messages": CONVERSATION[1:]}, {"messages": CONVERSATION[2:]}, {"messages": CONVERSATION[2:0:-1] * 2}]
    template = "{{ messages[0].role }}" + TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
    with pytest.raises(UserError, match="2 of 3 rows") as caught:
        load(train_file=jsonl("c.jsonl", rows), chat_template=template)
    assert str(caught.value).count("begins with the assistant") == 2


def test_validation_examples_that_stand_in_training_are_counted(load: Load, said: list[str]) -> None:
    rows = [{"prompt": f"{i}?", "completion": f" {i}"} for i in range(20)]
    load(train_file=jsonl("t.jsonl", rows[:15]), validation_file=jsonl("v.jsonl", rows[12:]))
    assert "validation: 3 of 8 examples also appear in the training data (v.jsonl:1, v.jsonl:2, v.jsonl:3)" in said
    said.clear()
    load(train_file=jsonl("u.jsonl", rows))
    assert not [line for line in said if "also appear" in line]
    load(train_file=jsonl("w.jsonl", [rows[0]] * 20))
    assert [line for line in said if "1 of 1 examples also appear in the training data" in line]


ADDED = [{"prompt": f"more {n}", "completion": "c"} for n in range(500)]


@pytest.mark.parametrize("moment", ["while it is read", "after the columns", "between count and fingerprint"])
def test_a_file_that_grows_while_it_is_read_is_noticed_and_nothing_is_kept(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    rows = [{"prompt": f"text {n}", "completion": "c"} for n in range(3000)]
    train, dev = Path(jsonl("train.jsonl", rows)), jsonl("dev.jsonl", rows[:2])
    grown: list[bool] = []

    def grow() -> None:
        if not grown:
            grown.append(True)
            with train.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in ADDED))

    whole: dict[str, Any] = {"train_file": "train.jsonl", "validation_file": dev}
    hooks: dict[str, Any] = {}
    if moment == "while it is read":
        hooks = {"progress": lambda *_: grow()}
    elif moment == "after the columns":
        hooks = {"check_stop": grow}
    else:
        whole = {"train_file": "train.jsonl"}
        count = FileRows.count

        def count_and_grow(rows: FileRows) -> int:
            number = count(rows)
            grow()
            return number

        monkeypatch.setattr(FileRows, "count", count_and_grow)
    with pytest.raises(UserError, match=r"`train.jsonl` changed while it was being read") as caught:
        load(**whole, **hooks)
    assert grown == [True]
    assert "run the same command again" in str(caught.value)
    kept = [path.name for path in (tmp_path / "cache" / "tokens").iterdir()]
    assert kept == [], "an entry under a key that is not that of its content"
    data = load(**whole)
    assert len(data.train) + (len(data.validation or ()) if "validation_file" not in whole else 0) == 3500


def test_a_file_that_changes_and_comes_back_is_noticed(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"text {n}", "completion": "c"} for n in range(3000)]
    train = Path(jsonl("train.jsonl", rows))
    original = train.read_bytes()
    read = FileRows.read

    def read_another(files: FileRows) -> Any:
        train.write_bytes(original.replace(b"text", b"lies"))
        yield from read(files)
        train.write_bytes(original)

    monkeypatch.setattr(FileRows, "read", read_another)
    with pytest.raises(UserError, match="changed while it was being read"):
        load(train_file="train.jsonl", validation_file=jsonl("dev.jsonl", rows[:2]))


def test_files_that_rest_are_read_as_ever(load: Load) -> None:
    rows = [{"prompt": f"text {n}", "completion": "c"} for n in range(40)]
    settings = {"train_file": jsonl("train.jsonl", rows), "validation_file": jsonl("dev.jsonl", rows[:2])}
    assert load(**settings).fingerprint == load(**settings).fingerprint
