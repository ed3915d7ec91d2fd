"""Forms of data known by their columns, and columns that may be missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.test_preferences import USER, Loader, says
from tiny_model import write_tiny_model
from trietune import UserError
from trietune.data.encoder import load_tokenizer
from trietune.data.templates import PromptFormat, fill_template, find_optional
from trietune.evaluation.predict import make_examples


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def load(tokenizer: Any, tmp_path: Path) -> Loader:
    return Loader(tokenizer, tmp_path)


CHAT = ("<bos><user>hi<eos><assistant>", "yes<eos>")
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]


@pytest.mark.parametrize(
    ("row", "given", "learned"),
    [
        ({"question": "q", "answer": "a"}, "<bos>Question: q\nAnswer:", " a<eos>"),
        ({"question": "q", "answer": 0, "context": "c"}, "<bos>Context: c\n\nQuestion: q\nAnswer:", " 0<eos>"),
        ({"query": "q", "response": "a"}, "<bos>q\n", "a<eos>"),
        ({"prompt": "q", "response": "a"}, "<bos>q\n", "a<eos>"),
        ({"input": 0, "output": False}, "<bos>0\n", "false<eos>"),
        ({"conversations": SHAREGPT}, *CHAT),
        ({"conversations": [USER, says("yes")]}, *CHAT),
        ({"conversations": json.dumps(SHAREGPT)}, *CHAT),
        ({"messages": SHAREGPT}, *CHAT),
        ({"prompt": [USER], "completion": [says("yes")]}, *CHAT),
        ({"prompt": json.dumps([USER]), "completion": json.dumps([says("yes")])}, *CHAT),
        ({"prompt": [USER], "completion": "yes"}, *CHAT),
        ({"messages": [USER, says("yes")], "system": ""}, *CHAT),
        ({"conversations": SHAREGPT, "system": "s"}, "<bos><system>s<eos><user>hi<eos><assistant>", "yes<eos>"),
        ({"text": "all of it"}, "<bos>", "all of it<eos>"),
    ],
)
def test_a_row_of_each_form(row: dict[str, Any], given: str, learned: str, load: Loader) -> None:
    data = load([row], objective="sft")
    assert load.text(data, 0) == (given, learned)
    assert not any("nothing uses" in line or "without a completion" in line for line in load.said)


def test_answers_in_a_prompt_of_messages_are_given_and_not_learnt(load: Loader) -> None:
    row = {"prompt": [USER, says("earlier"), USER], "completion": [says("now")]}
    given, learned = load.text(load([row], objective="sft"), 0)
    assert "earlier" in given
    assert learned == "now<eos>"


@pytest.mark.parametrize("first", [0, 1])
def test_alpaca_has_its_input_where_a_row_has_one(first: int, load: Loader) -> None:
    rows = [{"instruction": "do", "output": "done"}, {"instruction": "do", "input": "it", "output": "done"}]
    empty = {"instruction": "do", "input": "", "output": "done"}
    data = load([rows[first], rows[1 - first], empty], objective="sft", max_length=900)
    prompts = [data.train.examples[index].prompt for index in range(3)]
    with_input, without = prompts[1 - first], prompts[first]
    assert "### Instruction:\ndo\n\n### Input:\nit\n\n### Response:\n" in with_input
    assert "paired with an input" in with_input
    assert "### Instruction:\ndo\n\n### Response:\n" in without
    assert "paired" not in without
    assert prompts[2] == without
    assert any("is read by its columns" in line for line in load.said)
    [alone, both] = make_examples(data.prompt_format, ["do", {"instruction": "do", "input": "it"}])
    assert (alone.prompt, both.prompt) == (without, with_input)


def test_columns_that_may_be_missing_in_a_template_of_ones_own(load: Loader) -> None:
    rows = [{"a": "1", "b": "x"}, {"a": "2", "b": "y", "c": 0}]
    templates = {"prompt_template": "{a}{#c} ({c}){/c}{d?}:", "completion_template": " {b}"}
    data = load(rows, objective="sft", **templates)
    assert [data.train.examples[index].prompt for index in range(2)] == ["1:", "2 (0):"]
    kept = PromptFormat.from_json(data.prompt_format.to_json())
    assert kept == data.prompt_format
    assert '"format_version": 2' in data.prompt_format.to_json()
    assert make_examples(kept, ["3"])[0].prompt == "3:"
    with pytest.raises(UserError, match="a section over `c` that does not begin or does not end"):
        load([{"a": "1", "b": "x", "c": "z"}], objective="sft", prompt_template="{a}{#c}", completion_template="{b}")


def test_what_is_no_optional_column_stays_text() -> None:
    row = {"Is it good?": "yes", "a": "A"}
    assert fill_template("{Is it good?} {#x}{/x} {b?}", row, ["Is it good?", "a"]) == "yes {#x}{/x} {b?}"
    assert find_optional("{a?}", None) == ()
    assert fill_template("{a?}{#a}x{/a}", row) == "{a?}{#a}x{/a}"


def test_the_advice_for_unknown_columns_names_them_and_works(load: Loader) -> None:
    row = {"headline": "h", "body": "b", "summary": "s"}
    with pytest.raises(UserError) as refused:
        load([row], objective="sft")
    advice = str(refused.value)
    assert 'prompt_template: "headline: {headline}\\nbody: {body}\\n"' in advice
    assert 'completion_template: "{summary}"' in advice
    prompt = "headline: {headline}\nbody: {body}\n"
    data = load([row], objective="sft", prompt_template=prompt, completion_template="{summary}")
    assert load.text(data, 0) == ("<bos>headline: h\nbody: b\n", "s<eos>")
