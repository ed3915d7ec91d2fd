"""Long conversations: one rendering gives what rendering each prefix gives, or is not asked."""

from __future__ import annotations

from typing import Any

import pytest

from trietune.chat import one_rendering, turns
from trietune.chat.conversation import Conversation, RefusedError, RewrittenTurnError
from trietune.chat.template import ChatTemplate
from trietune.io.json_types import JsonObject

ASKS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
SHOWN = {
    "chatml": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}" + ASKS,
    "system apart": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{{ messages[0].content }}"
    "{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if loop.first %}^{% endif %}<|{{ m.role }}|>{{ m.content }}{% endfor %}" + ASKS,
    "looks back": "{% for m in messages %}{% if loop.index0 == 0 or messages[loop.index0 - 1].role != m.role %}"
    "<|{{ m.role }}|>{% endif %}{{ m.content }}{% endfor %}" + ASKS,
    "counts": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "<|{{ m.role }}|>{{ ns.n }}{{ m.content }}{% endfor %}" + ASKS,
    "generation": "{% for m in messages %}<|{{ m.role }}|>{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}" + ASKS,
}
# What each looks at is not the same for a prefix.
NOT_SHOWN = {
    "number": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ messages | length }}{% endfor %}" + ASKS,
    "last": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if loop.last and add_generation_prompt %}"
    "<|assistant|>{% endif %}{% endfor %}",
    "next": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if loop.nextitem is defined %}+{% endif %}"
    "{% endfor %}" + ASKS,
    "from the end": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ messages[-1].role }}{% endfor %}" + ASKS,
    "set in the loop, read after it": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "<|{{ m.role }}|>{{ m.content }}{% endfor %}" + ASKS + "{{ ns.n }}",
    "two loops": "{% for m in messages %}{{ m.role[0] }}{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content }}{% endfor %}" + ASKS,
    "a filter": "{% set u = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
    "<|{{ m.role }}|>{{ m.content }}{{ u[-1] == m }}{% endfor %}" + ASKS,
    "a macro": "{% macro all(of) %}{% for m in of %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% endmacro %}"
    "{{ all(messages) }}" + ASKS,
    "a condition of the loop": "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}"
    "{% endfor %}" + ASKS,
    "left early": "{% for m in messages %}{% if loop.index0 == 9 %}{% break %}{% endif %}<|{{ m.role }}|>"
    "{{ m.content }}{% endfor %}" + ASKS,
    "as a text": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{{ (messages | string)[:3] }}"
    + ASKS,
    "another name": "{% set ns = namespace(of=messages) %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% endfor %}{% for m in ns.of %}.{% endfor %}" + ASKS,
}
LOOKS_AHEAD = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if loop.index0 % 4 == 1 %}{% if messages[loop.index0 + 1] is defined %}+{% else %}-{% endif %}{% endif %}"
    "{% endfor %}" + ASKS
)


def conversation(num_turns: int, *, system: bool = False) -> list[JsonObject]:
    asked = [
        (
            {"role": "user", "content": f"q{n} " + "x" * (n % 5)},
            {"role": "assistant", "content": f"a{n} " + " " * (n % 3)},
        )
        for n in range(num_turns)
    ]
    return [*([{"role": "system", "content": "s"}] if system else []), *(one for pair in asked for one in pair)]


def split(template: str, messages: list[JsonObject], *, asks: bool = False, **more: Any) -> Any:
    are_answers = [one["role"] == "assistant" for one in messages]
    try:
        return turns.cut_turns(Conversation(messages, are_answers, asks=asks), ChatTemplate(template, {}, **more))
    except RefusedError as error:
        return type(error), str(error)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many turns were told by one rendering, a number a conversation."""
    found: list[int] = []
    ask = turns._lengths_from_one_rendering

    def asked(*given: Any) -> Any:
        known = ask(*given)
        found.append(len(known))
        return known

    monkeypatch.setattr(turns, "_lengths_from_one_rendering", asked)
    return found


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", [*SHOWN, *NOT_SHOWN, "looks ahead"])
def test_one_rendering_says_what_every_rendering_says(
    name: str, system: bool, asks: bool, shown: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = {**SHOWN, **NOT_SHOWN, "looks ahead": LOOKS_AHEAD}[name]
    messages = conversation(9, system=system)
    if asks:
        messages = messages[:-1]
    at_once = split(template, messages, asks=asks)
    monkeypatch.setattr(turns, "MOST_TURNS_RENDERED_EACH", 1_000)
    assert at_once == split(template, messages, asks=asks)
    num_turns = 8 if asks else 9
    if name == "looks ahead":
        assert len(shown) == 1
        assert 0 < shown[0] < num_turns  # of the others, what comes later was asked
    else:
        assert shown == [num_turns if name in SHOWN else 0]


def test_4000_turns_are_rendered_a_few_times() -> None:
    calls: list[None] = []
    segments = split(SHOWN["chatml"], conversation(2_000), tell=lambda: calls.append(None))
    assert len(segments) == 4_000
    assert segments[-2:] == [("\n<|user|>q1999 xxxx</s>\n<|assistant|>", False), ("a1999  </s>", True)]
    assert len(calls) <= 5


def test_a_rewritten_turn_of_a_long_conversation_is_named(shown: list[int]) -> None:
    rewrites = SHOWN["chatml"].replace("{% endfor %}", "{% endfor %}{{ '#' if not add_generation_prompt }}")
    assert split(rewrites, conversation(9)) == (
        RewrittenTurnError,
        "the chat template rewrites message 2 once others follow",
    )
    assert shown == [1]  # the last, which nothing follows


def test_another_release_of_transformers_renders_each(shown: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    usual = split(SHOWN["chatml"], conversation(9))
    monkeypatch.setattr(one_rendering, "_converter", lambda: None)
    assert split(SHOWN["chatml"], conversation(9)) == usual
    assert shown == [9, 0]


def test_what_is_recorded_is_compared_with_what_is_rendered(shown: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    usual = split(SHOWN["chatml"], conversation(9))
    other = lambda messages: [{**one, "content": one["content"] + "!"} for one in messages]  # noqa: E731
    monkeypatch.setattr(one_rendering, "_converter", lambda: other)
    assert split(SHOWN["chatml"], conversation(9)) == usual
    assert shown == [9, 0]
