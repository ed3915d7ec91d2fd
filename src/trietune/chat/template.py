"""A chat template and what it makes of messages, as transformers renders it.

This runs in the process of `trietune.chat.process`, never in the one that trains.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from trietune.chat.one_rendering import render_once
from trietune.chat.prefixes import Prefixes
from trietune.io.json_types import JsonObject


@dataclass(frozen=True, slots=True)
class _CallForm:
    """How a template wants a call of a tool: its arguments as text or as an object, no content as null or as text."""

    has_text_arguments: bool = False
    has_null_content: bool = True


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template.

    Attributes:
        source: in Jinja.
        special_tokens: of the tokenizer, by the names that templates know: `bos_token`.
        tell: called after each rendering, so that whoever waits knows that one has ended.
    """

    source: str
    special_tokens: JsonObject
    tell: Callable[[], None] = lambda: None

    def render(self, fields: Sequence[JsonObject], tools: list[Any] | None, *, asks: bool) -> str:
        """The text of messages, and with `asks` of a question for an answer. Raises whatever the template raises."""
        rendered = render_jinja_template(
            conversations=[list(fields)],
            tools=tools,
            documents=None,
            chat_template=self.source,
            add_generation_prompt=asks,
            **self.special_tokens,
        )
        self.tell()
        return str(rendered[0][0])

    def render_prefixes(self, fields: Sequence[JsonObject], tools: list[Any] | None, *, asks: bool) -> Prefixes | None:
        """`render_once`; None also where the template raises, which whoever renders next will say."""
        if not fields:
            return None
        variables = {**self.special_tokens, "tools": tools, "documents": None, "add_generation_prompt": asks}
        try:
            prefixes = render_once(fields, variables, self.source)
        except Exception:
            return None
        self.tell()
        return prefixes

    def with_calls(self, fields: Sequence[JsonObject]) -> list[JsonObject]:
        """Messages whose calls of tools have the form that the template wants: data have them in either."""
        if not any("tool_calls" in one for one in fields):
            return list(fields)
        return [_in_form(one, self._call_form) for one in fields]

    @cached_property
    def _call_form(self) -> _CallForm:
        """What the template makes of a small call tells how it wants one.

        Taken is the first form that neither raises nor writes Python's `{'k': 'v'}`, `None` or `null` into the text.
        """
        last: _CallForm | None = None
        for has_text_arguments in (False, True):
            for has_null_content in (True, False):
                form = _CallForm(has_text_arguments, has_null_content)
                arguments = json.dumps({"k": "v"}) if has_text_arguments else {"k": "v"}
                call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
                asked = [{"role": "user", "content": "a"}]
                said = {"role": "assistant", "content": None if has_null_content else "", "tool_calls": [call]}
                for before in (asked, [{"role": "system", "content": "s"}, *asked]):
                    try:
                        given = self.render(before, [_PROBED_TOOL], asks=True)
                        text = self.render([*before, said], [_PROBED_TOOL], asks=False)
                    except Exception:  # noqa: S112  (it may raise anything, and then wants another form)
                        continue
                    said_text = text.removeprefix(given)
                    if "None" in said_text or "null" in said_text:
                        continue
                    last = last or form
                    if "{'k'" not in said_text and '{\\"k\\"' not in said_text:
                        return form
        return last or _CallForm()


_PROBED_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {
            "type": "object",
            "properties": {"k": {"type": "string", "description": "d"}},
            "required": ["k"],
        },
    },
}


def _in_form(fields: JsonObject, form: _CallForm) -> JsonObject:
    if "tool_calls" not in fields:
        return fields
    content = "" if fields["content"] is None and not form.has_null_content else fields["content"]
    return {**fields, "content": content, "tool_calls": [_call_in_form(one, form) for one in fields["tool_calls"]]}


def _call_in_form(call: JsonObject, form: _CallForm) -> JsonObject:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call_in_form(call["function"], form)}
    arguments = call.get("arguments")
    if form.has_text_arguments and isinstance(arguments, dict):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if not form.has_text_arguments and isinstance(arguments, str):
        try:
            decoded = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        return {**call, "arguments": decoded} if isinstance(decoded, dict) else call
    return call
