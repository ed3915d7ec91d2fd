"""Templates, and how rows of every known form become examples."""

from __future__ import annotations

from typing import Any

import pytest

from trietune.data.columns import RowFormat, Unlabeled, WrongRow, choose_row_format, example_maker
from trietune.data.examples import Example, Message
from trietune.data.messages import read_messages
from trietune.data.templates import PromptFormat, fill_template, find_columns, literal_text
from trietune.errors import UserError


def recipe_for(columns: list[str], **changes: Any) -> RowFormat:
    defaults: dict[str, Any] = {"task_name": None, "prompt_template": None, "completion_template": None}
    return choose_row_format(columns, source="data.jsonl", **{**defaults, **changes})


def make(row: dict[str, Any], **changes: Any) -> Example:
    if "prompt_template" not in changes and "task_name" not in changes:
        changes["task_name"] = "sst2" if "sentence" in row else "squad" if "context" in row else None
    return example_maker(recipe_for(list(row), **changes))(row, "data.jsonl:1")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Review: {sentence}\nOutput:", "Review: fine\nOutput:"),
        ('{"label": "{sentence}"}', '{"label": "fine"}'),
        ("{{sentence}} is {sentence}", "{sentence} is fine"),
        ("{} { sentence } {0} {sentence", "{} { sentence } {0} {sentence"),
        ("{number} {truth} {nothing}.", "3 true ."),
    ],
)
def test_a_template_takes_columns_and_leaves_other_braces(template: str, text: str) -> None:
    row = {"sentence": "fine", "number": 3, "truth": True, "nothing": None}
    assert fill_template(template, row) == text


def test_text_from_a_column_is_never_a_template() -> None:
    assert fill_template("{a}", {"a": "{b} {{b}}", "b": "no"}) == "{b} {{b}}"


def test_columns_and_words_of_a_template() -> None:
    assert find_columns("{a} {b} {a} {{c}}") == ("a", "b")
    assert literal_text("x {a} y {{c}}") == "x  y {c}"


def test_sst2_and_squad_read_as_the_design_says() -> None:
    assert make({"sentence": "a fine film ", "label": "1"}) == Example(
        "data.jsonl:1", "Review: a fine film \nOutput:", ' {"label": "positive"}'
    )
    assert make({"sentence": "dull", "label": 0}).completion == ' {"label": "negative"}'
    answered = make(
        {"id": "q1", "context": "C.", "question": "Q?", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}}
    )
    assert answered == Example("q1", "\nContext: C.\n\nQuestion: Q?\n\nAnswer:\n", "a", ("a", "b"))
    assert make({"context": "C.", "question": "Q?", "answers": {"text": []}}).completion == "unanswerable"


@pytest.mark.parametrize("answers", [["a", "b"], [{"text": "a"}, {"text": "b"}], {"text": ["a", "b"]}])
def test_answers_come_in_several_forms(answers: Any) -> None:
    assert make({"context": "C.", "question": "Q?", "answers": answers}).answers == ("a", "b")


@pytest.mark.parametrize("label", [2, "2", "good", 0.5, "0.5"])
def test_a_wrong_label_is_named(label: Any) -> None:
    with pytest.raises(WrongRow, match=f"label `{label}` is neither 0"):
        make({"sentence": "fine", "label": label})


@pytest.mark.parametrize("label", [-1, "-1", "", None])
def test_the_label_of_a_test_split_is_none(label: Any) -> None:
    with pytest.raises(Unlabeled):
        make({"sentence": "fine", "label": label})


def test_recognized_columns() -> None:
    assert make({"prompt": "p", "completion": " c", "more": 1}) == Example("data.jsonl:1", "p", " c")
    assert make({"text": "all of it"}) == Example("data.jsonl:1", "", "all of it")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    expected = (Message("user", "Hi"), Message("assistant", "Hello"))
    assert make({"messages": turns}).messages == expected
    assert make({"messages": '[{"role": "assistant", "content": "x"}]'}).messages == (Message("assistant", "x"),)
    assert recipe_for(["input_ids", "labels"]).kind == "tokens"


def test_what_follows_the_last_answer_is_left_out() -> None:
    turns = [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]
    assert make({"messages": turns}).messages == (Message("assistant", "Hello"),)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "not a list of messages"),
        (None, "not a list of messages"),
        ("hello", "not a JSON list"),
        ([{"role": "user", "content": "Hi"}], "no message has the role `assistant`"),
        ([{"from": "narrator", "value": "Hi"}], "from `narrator`"),
        ([{"role": "assistant", "content": None}], "not text"),
        ([{"role": "assistant", "content": "x", "tool_calls": [1]}], "not a list of objects"),
        (["hello"], 'has no "role"'),
    ],
)
def test_a_conversation_that_cannot_be_one_says_why(messages: Any, reason: str) -> None:
    with pytest.raises(WrongRow, match=reason):
        make({"messages": messages})


def test_own_templates_come_before_recognized_columns() -> None:
    row = {"sentence": "fine", "label": "1", "why": "moving"}
    assert make(row, prompt_template="{sentence}?", completion_template=" {why}") == Example(
        "data.jsonl:1", "fine?", " moving"
    )


@pytest.mark.parametrize(
    ("columns", "changes", "message"),
    [
        (["foo"], {}, "not clear what to learn"),
        (["foo"], {"task_name": "sst2"}, "`sentence`, `label` missing"),
        (["context", "question"], {"task_name": "squad"}, "`answers` missing"),
        (["question", "answer"], {"prompt_template": "{quesion}", "completion_template": "{answer}"}, "`quesion`"),
        (["question"], {"prompt_template": "{question}", "completion_template": "yes"}, "names no column"),
    ],
)
def test_columns_that_do_not_fit_are_the_users_mistake(columns: list[str], changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe_for(columns, **changes)


def test_advice_names_the_columns_that_are_there() -> None:
    with pytest.raises(UserError) as caught:
        recipe_for(["headline", "summary"])
    assert 'completion_template: "{summary}"' in str(caught.value)
    with pytest.raises(UserError) as caught:
        recipe_for(["question", "answer"], prompt_template="{questoin}", completion_template="{answer}")
    assert "did you mean `{question}`?" in str(caught.value)
    with pytest.raises(UserError) as caught:
        recipe_for(["id", 'the "film"', "mood"])
    assert r'prompt_template: "the \"film\": {the \"film\"}\n" and completion_template: "{mood}"' in str(caught.value)
    with pytest.raises(UserError) as caught:
        recipe_for(["a {b}", "c"])
    assert "rename `a {b}`: a template cannot ask for a name that holds braces" in str(caught.value)
    with pytest.raises(UserError, match="missing") as caught:
        recipe_for(["conversations"], task_name="sst2")
    assert "its columns are `conversations`" in str(caught.value)


def test_a_list_in_a_template_is_a_wrong_row() -> None:
    with pytest.raises(WrongRow, match="`a` holds a list"):
        make({"a": [1], "b": "x"}, prompt_template="{a}", completion_template="{b}")
    with pytest.raises(WrongRow, match="no column `completion`"):
        example_maker(RowFormat("columns"))({"prompt": "x"}, "data.jsonl:1")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Review: {Review Text}\nMood:", "Review: fine\nMood:"),
        ("{ padded }|{a-b}|{1}|{Rating (1-5)}|{it's}", "p|dash|one|5|apostrophe"),
        ("{a}{a}", "AA"),
        ('{"label": "{a}", "b": {"c": {a}}}', '{"label": "A", "b": {"c": A}}'),
        (
            "{{Review Text}} {{no column}} {{Rating (1-5)}} {{x:.2f}}",
            "{Review Text} {no column} {Rating (1-5)} {x:.2f}",
        ),
        ('{} {"x"} {a, b} {f(x)} {\n} { } {{"k": 1}}', '{} {"x"} {a, b} {f(x)} {\n} { } {{"k": 1}}'),
    ],
)
def test_a_placeholder_is_a_column_exactly_as_it_is_spelt(template: str, text: str) -> None:
    row = {
        "Review Text": "fine", " padded ": "p", "a-b": "dash", "1": "one", "Rating (1-5)": 5, "it's": "apostrophe",
        "a": "A", "answer": "yes",
    }  # fmt: skip
    example = make(row, prompt_template=template, completion_template="{answer}")
    assert example.prompt == text
    example = make(row, prompt_template="", completion_template=template + "{answer}")
    assert example.completion == text + "yes"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Review  Text", "Review Text"),
        ("review_text", "Review Text"),
        (" Review Text", "Review Text"),
        ("Review Text!r", "Review Text"),
        ("Review Text:>20", "Review Text"),
        ("review-tex", "Review Text"),
        ("0", None),
        ("größe", None),
    ],
)
def test_a_name_that_is_no_column_is_refused_with_the_nearest(name: str, near: str | None) -> None:
    for templates in (("{%s}", "{label}"), ("a", "{label} {%s}")):
        prompt, completion = (template.replace("%s", name) for template in templates)
        with pytest.raises(UserError) as caught:
            recipe_for(["Review Text", "label"], prompt_template=prompt, completion_template=completion)
        assert f"the column `{name}`" in str(caught.value)
        assert (f"did you mean `{{{near}}}`?" if near else f"write `{{{{{name}}}}}`") in str(caught.value)


def test_templates_of_the_first_adapters_mean_what_they_meant() -> None:
    assert fill_template("{a b} {0} {{0}} {a}", {"a": "A", "a b": "no", "0": "no"}) == "{a b} {0} {0} A"


def test_a_key_twice_is_an_error_in_messages_and_in_a_prompt_format() -> None:
    with pytest.raises(TypeError, match="column `messages` holds an object with a duplicate key `content`"):
        read_messages('[{"role": "user", "content": "a", "content": "b"}]')
    with pytest.raises(UserError, match="duplicate key `kind`"):
        PromptFormat.from_json('{"format_version": 1, "kind": "chat", "kind": "template"}')
