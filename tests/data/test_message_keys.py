"""Keys of messages besides role and content: what is learned, what the chat template gets, what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.test_preferences import USER, Loader, says
from tiny_model import write_tiny_model
from trietune import UserError
from trietune.data import make_encoder
from trietune.data.encoder import load_tokenizer
from trietune.evaluation.predict import make_examples

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
KNOWS_TOOLS = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.name %}({{ m.name }}){% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As DeepSeek's: arguments are put together with text, and null is not text.
WANTS_TEXT = KNOWS_TOOLS.replace("{{ c.function.arguments | tojson }}", "{{ ':' + c.function.arguments }}")
CUTS_REASONING = PLAIN.replace("m.content }}", "m.content.split('</think>')[-1] }}")
DROPS_TOOL_ROLE = PLAIN.replace("%}<{{", "%}{% if m.role == 'tool' %}{% continue %}{% endif %}<{{")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ASKED = [USER, CALLS, {"role": "tool", "tool_call_id": "abcdefghi", "content": "sun"}, says("Sunny.")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def load(tokenizer: Any, tmp_path: Path) -> Loader:
    return Loader(tokenizer, tmp_path)


def learn(load: Loader, *messages: Any, template: str = PLAIN, **columns: Any) -> tuple[str, str]:
    """What is given and what is learned of one conversation."""
    return load.text(load([{"messages": list(messages), **columns}], objective="sft", chat_template=template), 0)


@pytest.mark.parametrize("switch", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"loss": 0}])
def test_an_answer_that_says_so_is_not_learnt_and_counted(switch: dict[str, Any], load: Loader) -> None:
    given, said = learn(load, USER, {**says("bad"), **switch}, USER, says("good"))
    assert said == "good<eos>"
    assert "bad" in given
    assert any("1 of the answers not learned" in line for line in load.said)


def test_the_end_of_a_last_answer_that_is_not_learnt_is_not_learnt(load: Loader) -> None:
    assert learn(load, USER, says("good"), USER, {**says("bad"), "train": False})[1] == "good<eos>"


def test_what_is_not_to_be_learnt_is_not_measured(load: Loader) -> None:
    rows = [{"messages": [USER, {**says("bad"), "loss": False}, USER, says("good")]}]
    data = load(rows, objective="sft")
    assert data.validation is not None
    assert (data.validation.labels != -100).sum() == len("good") + 1


def test_conversations_of_which_nothing_is_learnt_are_left_out(load: Loader) -> None:
    rows = [{"messages": [USER, {**says("bad"), "train": False}]}, {"messages": [USER, says("good")]}]
    assert len(load(rows, objective="sft").train) == 1
    assert any("1 of weight 0, left out (train.jsonl:1)" in line for line in load.said)
    with pytest.raises(UserError, match="`loss` or `train` is false"):
        load(rows[:1], objective="sft")


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"loss": "no"}, "neither true nor false"),
        ({"train": 2}, "neither true nor false"),
        ({"weight": 1, "loss": False}, "both that it is learned and that it is not"),
        ({"weight": "0"}, "not a number"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "a part of the type `image_url`"),
        ({"content": {"text": "x"}}, "not text"),
        ({"content": None}, "not text"),
        ({"content": None, "function_call": {"name": "f"}}, "older form"),
        ({"content": None, "tool_calls": "f()"}, "not a JSON list"),
    ],
)
def test_a_key_that_cannot_be_meant_is_refused_with_its_place(keys: dict[str, Any], reason: str, load: Loader) -> None:
    with pytest.raises(UserError, match=reason) as refused:
        learn(load, USER, {**says("a"), **keys})
    assert "train.jsonl:1" in str(refused.value)


def test_parts_of_text_are_joined(load: Loader) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two", "image_url": None}]
    given, said = learn(load, {"role": "user", "content": parts}, {"role": "assistant", "content": parts})
    assert "<user>one two" in given
    assert said == "one two<eos>"


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, json.dumps({"city": "Rome"})])
@pytest.mark.parametrize(
    ("template", "written"), [(KNOWS_TOOLS, '{"city": "Rome"}'), (WANTS_TEXT, ':{"city": "Rome"}')]
)
def test_calls_of_tools_are_learnt_in_the_form_that_the_template_wants(
    template: str, written: str, arguments: Any, load: Loader
) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    given, said = learn(load, USER, {**CALLS, "tool_calls": [call]}, *ASKED[2:], template=template, tools=TOOLS)
    assert said == f"<call>weather{written}<eos>Sunny.<eos>"
    assert "<tools>" in given
    assert "None" not in given + said


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_reach_the_template_in_training_and_in_use(tools: Any, load: Loader, tokenizer: Any) -> None:
    data = load([{"messages": ASKED, "tools": tools}], objective="sft", chat_template=KNOWS_TOOLS)
    encoder = make_encoder(tokenizer, data.prompt_format)
    [asked] = make_examples(data.prompt_format, [{"messages": ASKED[:3], "tools": tools}])
    ids = encoder.encode_prompt(asked)
    assert data.train.input_ids[: len(ids)].tolist() == ids
    assert not any("that nothing uses" in line for line in load.said)


def test_a_call_that_the_template_does_not_write_is_refused(load: Loader) -> None:
    with pytest.raises(UserError, match="an answer calls `weather`, and the chat template writes nothing of it"):
        learn(load, *ASKED)


def test_nulls_and_empty_lists_that_a_table_adds_are_not_keys(load: Loader) -> None:
    filler = {"tool_calls": None, "name": None, "weight": None, "loss": None}
    rows = [{"messages": [{**USER, **filler}, {**says("a"), **filler, "tool_calls": []}], "tools": None}]
    load(rows, objective="sft", chat_template=KNOWS_TOOLS)
    assert not any("does not take" in line or "not learned" in line for line in load.said)


def test_keys_and_messages_that_the_template_leaves_out_are_counted(load: Loader) -> None:
    named = {**USER, "name": "Ann", "stamp": 3}
    learn(load, named, says("a"), named, says("b"), template=KNOWS_TOOLS, tools=TOOLS)
    assert any("2 with `stamp`, which the chat template does not take (train.jsonl:1" in line for line in load.said)
    assert not any("`name`" in line for line in load.said)
    load.said.clear()
    learn(load, named, says("a"), tools=TOOLS)
    assert any("with `name`" in line for line in load.said)
    assert any("with `tools`" in line for line in load.said)
    load.said.clear()
    learn(load, USER, says("a"), {"role": "tool", "content": "the sun"}, says("b"), template=DROPS_TOOL_ROLE)
    assert any("1 of the other messages not written by the chat template" in line for line in load.said)


@pytest.mark.parametrize(
    "answer",
    [
        says("<think>because</think>yes"),
        says("because</think>yes"),
        {**says("yes"), "reasoning_content": "because"},
        {**says("yes"), "thinking": "because"},
    ],
)
def test_reasoning_that_the_template_cuts_out_is_said(answer: dict[str, Any], load: Loader) -> None:
    assert learn(load, USER, answer, template=CUTS_REASONING)[1] == "yes<eos>"
    assert any("1 of the answers without their reasoning" in line for line in load.said)


def test_reasoning_that_the_template_writes_is_learnt(load: Loader) -> None:
    template = PLAIN.replace(
        "{{ m.content", "{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}{{ m.content"
    )
    for key in ("reasoning_content", "thinking"):
        load.said.clear()
        assert learn(load, USER, {**says("yes"), key: "because"}, template=template)[1] == "[because]yes<eos>"
        assert not any("reasoning" in line or "take" in line for line in load.said)


def test_a_template_that_drops_earlier_reasoning_makes_each_turn_an_example(load: Loader) -> None:
    template = PLAIN.replace(
        "{{ m.content", "{% if m.reasoning_content and loop.last %}[{{ m.reasoning_content }}]{% endif %}{{ m.content"
    )
    answer = {**says("yes"), "reasoning_content": "because"}
    data = load([{"messages": [USER, answer, USER, answer]}], objective="sft", chat_template=template)
    assert [load.text(data, index)[1] for index in range(2)] == ["[because]yes<eos>"] * 2
    data = load([{"messages": [USER, says("a"), USER, says("b")]}], objective="sft", chat_template=template)
    assert len(data.train) == 1


def test_preferences_have_tools(load: Loader) -> None:
    row = {"prompt": [USER], "chosen": [CALLS], "rejected": [says("no")], "tools": TOOLS}
    data = load([row], chat_template=KNOWS_TOOLS)
    given, said = load.text(data, 0)
    assert given.startswith("<bos><tools>")
    assert said.startswith("<call>weather")


@pytest.mark.parametrize("template", [PLAIN, KNOWS_TOOLS])
def test_a_greeting_of_weight_0_is_given_and_not_learnt(template: str, load: Loader, tokenizer: Any) -> None:
    greeting = {**says("welcome"), "weight": 0}
    given, said = learn(load, greeting, USER, says("good"), template=template)
    assert given.startswith("<bos><assistant>welcome<eos><user>hi")
    assert said == "good<eos>"
    assert any("1 of the answers not learned" in line for line in load.said)
    data = load([{"messages": [greeting, USER, says("good")]}], objective="sft", chat_template=template)
    [asked] = make_examples(data.prompt_format, [{"messages": [greeting, USER]}])
    assert tokenizer.decode(make_encoder(tokenizer, data.prompt_format).encode_prompt(asked)) == given
    with pytest.raises(UserError, match='with `"weight": 0` it is given and not learned'):
        learn(load, says("welcome"), USER, says("good"), template=template)


def test_each_turn_of_a_conversation_that_a_greeting_of_weight_0_begins_is_an_example(load: Loader) -> None:
    thought = says("<think>hm</think>good")
    drops = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else m.content.split('</think>')[-1] }}<eos>"
    )
    drops += "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    rows = [{"messages": [{**says("welcome"), "train": False}, USER, thought, USER, thought]}]
    data = load(rows, objective="sft", chat_template=drops)
    assert data.prompt_format.is_turn_by_turn
    assert [load.text(data, index)[1] for index in range(len(data.train))] == ["<think>hm</think>good<eos>"] * 2


def test_an_answer_of_which_the_template_writes_nothing_is_refused(load: Loader, tmp_path: Path) -> None:
    silent = PLAIN.replace("{{ m.content }}<eos>", "{% if m.role == 'user' %}{{ m.content }}<eos>{% endif %}")
    with pytest.raises(UserError, match="the chat template writes nothing of an answer"):
        learn(load, USER, says("good"), template=silent)
    (tmp_path / "empty.jinja").write_text(" \n")
    with pytest.raises(UserError, match=r"`chat_template: .*empty\.jinja` is empty"):
        learn(load, USER, says("good"), template=str(tmp_path / "empty.jinja"))


@pytest.mark.parametrize("keys", [{"weight": 1}, {"train": True}, {"loss": True}])
def test_a_message_of_the_user_that_is_to_be_learnt_is_counted_as_one_that_is_not(
    keys: dict[str, Any], load: Loader
) -> None:
    assert learn(load, {**USER, **keys}, says("good"))[1] == "good<eos>"
    assert any(f"1 with `{next(iter(keys))}`, which the chat template does not take" in line for line in load.said)
    load.said.clear()
    learn(load, {**USER, **dict.fromkeys(keys, 0)}, says("good"))
    assert not any("does not take" in line for line in load.said)
