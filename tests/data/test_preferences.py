"""Preferences in the forms that TRL takes, and others: what becomes of a row, what is refused, left out, counted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_model import write_tiny_model
from trietune import UserError, load_config
from trietune.data.answers import with_every_label, with_other_completions
from trietune.data.encoder import load_tokenizer
from trietune.data.load import load_data
from trietune.data.loaded_data import Data
from trietune.data.preferences import common_beginning


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model")))


class Loader:
    """Loads rows from a file as a run would, and keeps what was said."""

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        self.tokenizer = tokenizer
        self.folder = folder
        self.said: list[str] = []

    def __call__(self, rows: list[dict[str, Any]], **settings: Any) -> Data:
        for name in ("train", "valid"):
            (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"train_file": str(self.folder / "train.jsonl"), "validation_file": str(self.folder / "valid.jsonl")}
        values = {"objective": "dpo", "max_length": 200, **files, **settings}
        return load_data(
            load_config(None, values, environ={}),
            self.tokenizer,
            cache_folder=self.folder / "cache",
            report=self.said.append,
            progress=lambda *_: None,
            check_stop=lambda: None,
        )

    def text(self, data: Data, index: int) -> tuple[str, str]:
        """What is given and what is learned of a sequence, decoded, special tokens by name."""
        train = data.train
        begin, end = int(train.offsets[index]), int(train.offsets[index + 1])
        is_label = train.labels[begin:end] != -100
        ids = train.input_ids[begin:end]
        return self.tokenizer.decode(ids[~is_label].tolist()), self.tokenizer.decode(ids[is_label].tolist())


@pytest.fixture
def load(tokenizer: Any, tmp_path: Path) -> Loader:
    return Loader(tokenizer, tmp_path)


USER = {"role": "user", "content": "hi"}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CHAT_GIVEN = "<bos><user>hi<eos><assistant>"


@pytest.mark.parametrize(
    ("row", "given", "chosen", "rejected"),
    [
        ({"prompt": "q:", "chosen": " yes", "rejected": " no"}, "<bos>q:", " yes<eos>", " no<eos>"),
        ({"chosen": "q: yes sir", "rejected": "q: no"}, "<bos>q:", " yes sir<eos>", " no<eos>"),
        ({"prompt": [USER], "chosen": [says("yes")], "rejected": [says("no")]}, CHAT_GIVEN, "yes<eos>", "no<eos>"),
        ({"chosen": [USER, says("yes")], "rejected": [USER, says("no")]}, CHAT_GIVEN, "yes<eos>", "no<eos>"),
        (
            {"prompt": "hi", "chosen": [USER, says("yes")], "rejected": [USER, says("no")]},
            CHAT_GIVEN, "yes<eos>", "no<eos>",
        ),
        ({"prompt": "hi", "chosen": [says("yes")], "rejected": [says("no")]}, CHAT_GIVEN, "yes<eos>", "no<eos>"),
        ({"prompt": "hi", "chosen": says("yes"), "rejected": says("no")}, CHAT_GIVEN, "yes<eos>", "no<eos>"),
        (
            {"chosen": json.dumps([USER, says("yes")]), "rejected": json.dumps([USER, says("no")])},
            CHAT_GIVEN, "yes<eos>", "no<eos>",
        ),
    ],
)  # fmt: skip
def test_a_pair_is_one_row_of_two_answers(
    row: Mapping[str, Any], given: str, chosen: str, rejected: str, load: Loader
) -> None:
    data = load([dict(row)])
    assert data.train.num_rows == 1
    assert len(data.train) == 2
    for index, said in enumerate((chosen, rejected)):
        prompt, answer = load.text(data, index)
        assert prompt == given
        assert answer.startswith(said)
        assert answer.replace("<eos>", "") == said.replace("<eos>", "")
    assert data.train.grades is not None
    assert data.train.grades.tolist() == [1, 0]
    assert data.train.row_id(0) == "train.jsonl:1"


def test_only_the_last_answer_of_a_conversation_is_compared(load: Loader) -> None:
    before = [USER, says("well"), USER]
    data = load([{"chosen": [*before, says("yes")], "rejected": [*before, says("no")]}])
    assert load.text(data, 0)[1].replace("<eos>", "") == "yes"
    assert data.prompt_format.kind == "chat"
    assert data.prompt_format.is_turn_by_turn


def test_scores_and_rankings_grade_several_answers(load: Loader) -> None:
    scored = load([{"prompt": "q:", "completions": [" a", " b", " c"], "scores": [0.5, 2, 1]}])
    assert scored.train.grades is not None
    assert scored.train.grades.tolist() == [0.5, 2, 1]
    ranked = load([{"prompt": "q:", "completions": [" a", " b", " c"], "ranking": [3, 1, 2]}])
    assert ranked.train.grades is not None
    assert np.argsort(-ranked.train.grades).tolist() == [1, 2, 0]
    chats = load([{"prompt": [USER], "completions": [[says("a")], [says("b")]], "scores": [1, 0]}])
    assert load.text(chats, 1)[1].startswith("b")


def test_verdicts_are_rows_of_one_answer(load: Loader) -> None:
    rows = [
        {"prompt": "q:", "completion": f" {n}", "label": label} for n, label in enumerate([True, False, 1, "false"])
    ]
    data = load(rows, objective="kto")
    assert data.train.grades is not None
    assert data.train.grades.tolist() == [1, -1, 1, -1]
    assert data.train.num_rows == len(data.train) == 4


def test_pairs_become_verdicts_under_kto(load: Loader) -> None:
    data = load([{"prompt": "q:", "chosen": " yes", "rejected": " no"}], objective="kto")
    assert data.train.num_rows == 2
    assert [data.train.row_id(row) for row in range(2)] == ["train.jsonl:1 chosen", "train.jsonl:1 rejected"]


def test_a_template_makes_the_prompt(load: Loader) -> None:
    row = {"question": "why", "chosen": " so", "rejected": " no"}
    data = load([row], prompt_template="Q {question}?")
    assert load.text(data, 0) == ("<bos>Q why?", " so<eos>")
    with pytest.raises(UserError, match="answer"):
        load([row], prompt_template="Q {answer}?")


@pytest.mark.parametrize(
    ("first", "second", "prompt"),
    [
        ("a b: yes", "a b: no", "a b:"),
        ("the cat", "the car", "the"),
        ("same", "same and more", "same"),
        ("Human: x\n\nAssistant: good", "Human: x\n\nAssistant: great", "Human: x\n\nAssistant:"),
        ("x", "y", ""),
    ],
)
def test_a_prompt_in_both_answers_ends_with_a_whole_word(first: str, second: str, prompt: str) -> None:
    assert first[: common_beginning(first, second)] == prompt
    assert common_beginning(first, second) == common_beginning(second, first)


def test_equal_answers_are_left_out_and_counted(load: Loader) -> None:
    rows = [
        {"prompt": "q:", "chosen": " yes", "rejected": " no"},
        {"prompt": "q:", "chosen": " yes", "rejected": " yes"},
    ]
    data = load(rows)
    assert data.train.num_rows == 1
    assert data.counts.train.without_pair.number == 1
    assert any("1 without two answers of which one is better, left out (train.jsonl:2)" in line for line in load.said)


def test_ties_and_repeats_of_a_ranked_row_make_no_pair(load: Loader) -> None:
    rows = [
        {"prompt": "q:", "completions": [" a", " b"], "scores": [1, 1]},
        {"prompt": "q:", "completions": [" a", " b", " a"], "scores": [1, 0, 5]},
    ]
    data = load(rows)
    assert data.train.num_rows == 1
    assert len(data.train) == 2
    assert data.counts.train.equal_answers.number == 1
    assert data.counts.train.without_pair.number == 1


def test_with_nothing_to_compare_the_error_names_rejected(load: Loader) -> None:
    with pytest.raises(UserError, match="rejected"):
        load([{"prompt": "q:", "chosen": " yes", "rejected": " yes"}])


def test_a_row_is_too_long_by_its_longest_answer(load: Loader) -> None:
    rows = [
        {"prompt": "q:", "chosen": " yes", "rejected": " " + "no" * 20},
        {"prompt": "q:", "chosen": " yes", "rejected": " no"},
    ]
    data = load(rows, max_length=20)
    assert data.train.num_rows == 1
    assert data.counts.train.overlong.number == 1
    assert data.validation is not None
    assert data.validation.num_rows == 2  # validation drops nothing
    with pytest.raises(UserError, match="too long"):
        load(rows, max_length=20, overlong="error")


def test_a_cut_prompt_stays_the_same_in_all_answers(load: Loader) -> None:
    data = load(
        [{"prompt": "0123456789:", "chosen": " yes", "rejected": " " + "n" * 8}],
        max_length=16,
        overlong="truncate_prompt",
    )
    (first, _), (second, answer) = load.text(data, 0), load.text(data, 1)
    assert first == second == "<bos>56789:"[: len("<bos>")] + first[len("<bos>") :]
    assert first.endswith("9:")
    assert answer == " " + "n" * 8 + "<eos>"
    assert int(np.diff(data.train.offsets).max()) == 16
    assert data.counts.train.truncated.number == 1


@pytest.mark.parametrize(
    ("row", "settings", "says"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"objective": "sft"}, "objective: dpo"),
        ({"prompt": "q", "completions": ["a"], "scores": [1]}, {"objective": "sft"}, "objective: dpo"),
        ({"prompt": "q", "completion": "a", "label": True}, {"objective": "sft"}, "objective: kto"),
        ({"prompt": "q", "completion": "a", "label": True}, {}, "objective: kto"),
        ({"prompt": "q", "completion": "a"}, {}, "objective: sft"),
        ({"prompt": "q", "chosen": "a"}, {}, "`rejected`"),
        ({"prompt": "q", "completions": ["a"], "scores": [1], "ranking": [1]}, {}, "remove one"),
        ({"prompt": "q", "completions": ["a", "b"], "scores": [1, 0]}, {"objective": "kto"}, "objective: dpo"),
        ({"prompt": "q", "completions": ["a", "b"], "scores": [1]}, {}, "2 `completions` and 1 `scores`"),
        ({"prompt": "q", "completions": ["a", "b"], "scores": [1, "x"]}, {}, "not a list of numbers"),
        ({"prompt": "q", "completion": "a", "label": "maybe"}, {"objective": "kto"}, "neither true nor false"),
        ({"prompt": "q", "chosen": None, "rejected": "b"}, {}, "`chosen` is missing"),
        ({"chosen": [USER, says("a")], "rejected": [{**USER, "content": "ho"}, says("b")]}, {}, "before their last"),
        ({"chosen": [says("a"), USER], "rejected": [says("b"), USER]}, {}, "differ before"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [says("b")]}, {}, "not `assistant`"),
        ({"prompt": [USER], "chosen": [says("a")], "rejected": [says("b")], "tools": {}}, {}, "tools"),
        ({"prompt": "q", "chosen": [{"from": "who", "value": "a"}], "rejected": [says("b")]}, {}, "from `who`"),
        ({"prompt": [USER], "chosen": [says("a")], "rejected": [says("b")]}, {"prompt_template": "{x}"}, "messages"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_what_to_write(
    row: Mapping[str, Any], settings: Mapping[str, Any], says: str, load: Loader
) -> None:
    with pytest.raises(UserError) as refused:
        load([dict(row)], **settings)
    assert says in str(refused.value)


def test_templates_over_preferences_learn_one_answer(load: Loader) -> None:
    row = {"prompt": "q:", "chosen": " yes", "rejected": " no"}
    data = load([row], objective="sft", prompt_template="{prompt}", completion_template="{chosen}")
    assert load.text(data, 0) == ("<bos>q:", " yes<eos>")


def test_rows_come_from_the_cache_as_they_were_made(load: Loader) -> None:
    rows = [{"prompt": "q:", "completions": [" a", " b", " c"], "scores": [n, 1, 2]} for n in range(4)]
    first, second = load(rows), load(rows)
    for name in ("input_ids", "labels", "offsets", "row_start", "grades"):
        assert np.array_equal(getattr(first.train, name), getattr(second.train, name))
    assert first.fingerprint == second.fingerprint
    assert load(rows, prompt_template="{prompt}").fingerprint != first.fingerprint


def test_the_other_completion_is_that_of_the_row_before(load: Loader) -> None:
    rows = [{"prompt": f"q{n}:", "completion": f" a{n}", "label": n % 2 == 0} for n in range(3)]
    data = load(rows, objective="kto")
    assert data.train.grades is not None
    sets = with_other_completions(data.train, np.asarray(data.train.grades))
    texts = [
        load.tokenizer.decode(sets.input_ids[sets.offsets[i] : sets.offsets[i + 1]].tolist()) for i in range(len(sets))
    ]
    pairs = [(0, 0), (0, 2), (1, 1), (1, 0), (2, 2), (2, 1)]
    assert texts == [f"<bos>q{prompt}: a{answer}<eos>" for prompt, answer in pairs]
    assert sets.is_trained.tolist() == [True, False] * 3
    assert sets.sequences_of(np.array([2, 0])).tolist() == [4, 5, 0, 1]


def test_every_label_follows_every_prompt(load: Loader) -> None:
    rows = [{"prompt": f"q{n}:", "completion": f" {'abc'[n % 3]}"} for n in range(4)]
    data = load(rows, objective="sft")
    from trietune.data.encoder import make_encoder

    encoder = make_encoder(load.tokenizer, data.prompt_format)
    completions = [np.array(encoder.encode_completion(text), np.int32) for text in (" a", " b", " c")]
    sets = with_every_label(data.train, completions)
    assert sets.num_rows == 4
    assert sets.grade.reshape(4, 3).argmax(1).tolist() == [0, 1, 2, 0]
    own = sets.sequences_of(np.array([1]))[1]
    begin, end = data.train.offsets[1:3]
    assert (
        sets.input_ids[sets.offsets[own] : sets.offsets[own + 1]].tolist() == data.train.input_ids[begin:end].tolist()
    )
    assert sets.labels[sets.offsets[own] : sets.offsets[own + 1]].tolist() == data.train.labels[begin:end].tolist()


def test_a_template_of_preferences_names_columns_as_any_other_does(load: Loader) -> None:
    row = {"Review Text": "fine", "chosen": " yes", "rejected": " no"}
    words = {"prompt_template": "R: {Review Text}{#notes} ({notes}){/notes}:"}
    data = load([row, {**row, "notes": "x"}], **words)
    assert [load.text(data, index)[0] for index in (0, 2)] == ["<bos>R: fine:", "<bos>R: fine (x):"]
    assert any("the first row of `train.jsonl` has no `notes`" in line for line in load.said)
    for template, reason in (
        ("{Review text}", "did you mean `{Review Text}`?"),
        ("{chosen[0]} {Review Text}", "a part of the column `chosen`"),
        ("{#chosen}{Review Text}", "a section over `chosen` that does not begin or does not end"),
    ):
        with pytest.raises(UserError) as refused:
            load([row], prompt_template=template)
        assert reason in str(refused.value)


def test_columns_of_later_rows_of_preferences_are_named(load: Loader) -> None:
    row = {"prompt": "a", "chosen": " yes", "rejected": " no"}
    load([row, {**row, "weight": 0}, {**row, "note": "x"}])
    for name, place in (("weight", 2), ("note", 3)):
        assert any(f"1 with a column `{name}`, which the first row has not" in line and f"train.jsonl:{place}" in line
                   for line in load.said)  # fmt: skip
