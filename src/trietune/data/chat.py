"""Conversations through a chat template, cut where the assistant speaks.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n      what the model is given
    Hello!<|im_end|>                                            what it has to say: labels
    \\n<|im_start|>user\\nAnd?<|im_end|>\\n<|im_start|>assistant\\n
    Well.<|im_end|>                                             labels

A turn begins where the template, given all that went before, asks for an answer. So what the model is given in training
is, character for character, what it is given in use.

Some templates rewrite an answer once others follow it: those of reasoning models drop its thoughts. Then no single
text holds all answers as they were given, and each turn becomes an example of its own. The trie computes what they
share once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

from jinja2 import TemplateError, TemplateSyntaxError

from trietune.data.columns import WrongRow
from trietune.data.examples import Example, Message
from trietune.data.one_rendering import Prefix, Prefixes, common_length, render_once
from trietune.io.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
from trietune.data.interruptible import TookTooLong, interruptible
from trietune.errors import StopRequested

Segment = tuple[
    str, bool
]  # text, and whether the assistant says it: whether it is to be learned, unless its weight is 0

# Of one conversation: templates of a hundred lines take milliseconds.
SECONDS_OF_A_TEMPLATE = 20.0
# Characters beyond a hundred times what it was given; tool descriptions of the longest templates have ten thousand.
MOST_OF_A_TEMPLATE = 1_000_000

# Of a conversation with as many answers, one rendering is asked for what its prefixes give.
MOST_TURNS_RENDERED_EACH = 8

_T = TypeVar("_T")
_PROBE = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))


class TemplateTooSlowError(WrongRow):
    """The template did not come to an end."""


class RewrittenTurnError(WrongRow):
    """An answer does not stand in the text of the whole conversation as it was given."""


def _never() -> None:
    """No stop is asked for."""


def rewrites_turns(
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str,
    conversations: Sequence[Example] = (),
    check_stop: Callable[[], None] = _never,
) -> bool:
    """Whether the template rewrites earlier answers as a conversation continues.

    Args:
        conversations: some of the data; those that think or call tools are tried, for templates that only rewrite such.
    """
    for one in conversations:
        if any(message.more or "</think>" in message.content for message in one.messages):
            try:
                split_turns(
                    one.messages,
                    tokenizer=tokenizer,
                    chat_template=chat_template,
                    add_generation_prompt=False,
                    tools=one.tools,
                    check_stop=check_stop,
                )
            except RewrittenTurnError:
                return True
            except TemplateTooSlowError:
                return False  # whoever uses it next says so
            except WrongRow:
                continue
    # Some templates want a system message; what refuses both will be told by real conversations.
    for probe in (_PROBE, (Message("system", "s"), *_PROBE)):
        try:
            split_turns(
                probe,
                tokenizer=tokenizer,
                chat_template=chat_template,
                add_generation_prompt=False,
                check_stop=check_stop,
            )
        except TemplateTooSlowError:
            return False
        except RewrittenTurnError:
            return True
        except WrongRow:
            continue
        return False
    return False


def is_answer(message: Message, index: int) -> bool:
    """Whether a message is one that something asks for; a greeting before all others, of weight 0, is given."""
    return message.role == "assistant" and (index > 0 or message.weight != 0)


def split_turns(
    messages: Sequence[Message],
    *,
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str,
    add_generation_prompt: bool,
    tools: str = "",
    check_stop: Callable[[], None] = _never,
) -> list[Segment]:
    """The rendered conversation as alternating segments, text that is given and text that the assistant says.

    With `add_generation_prompt` the last segment asks for the next answer; without it, the last one is an answer.

    Raises:
        WrongRow: the template refuses the conversation.
        RewrittenTurnError: it rewrites earlier turns as it continues.
    """
    render: Callable[..., str] = partial(
        _render, tokenizer=tokenizer, chat_template=chat_template, tools=tools, check_stop=check_stop
    )
    render_prefixes: Callable[..., Prefixes | None] = partial(
        _render_prefixes, tokenizer=tokenizer, chat_template=chat_template, tools=tools, check_stop=check_stop
    )
    full = render(messages, asks=add_generation_prompt)
    turns = [index for index, message in enumerate(messages) if is_answer(message, index)]
    known: Mapping[int, tuple[int, int]] = {}
    if len(turns) >= MOST_TURNS_RENDERED_EACH:
        known = _lengths_from_one_rendering(messages, turns, full, render, render_prefixes)
    segments: list[Segment] = []
    end = 0
    for index in turns:
        is_last = index == len(messages) - 1 and not add_generation_prompt
        if index in known:
            given_length, said_length = known[index]
            is_rewritten = False
        else:
            given = render(messages[:index], asks=True)
            said = full if is_last else render(messages[: index + 1], asks=False)
            given_length, said_length = len(given), len(said)
            is_rewritten = not (full.startswith(said) and said.startswith(given))
        if is_rewritten or given_length < end:
            raise RewrittenTurnError(f"the chat template rewrites message {index + 1} once others follow")
        segments.append((full[end:given_length], False))
        segments.append((_without_space_behind(full[given_length:said_length]), True))
        end = given_length + len(segments[-1][0])
    if add_generation_prompt:
        segments.append((full[end:], False))
    return segments


def _lengths_from_one_rendering(
    messages: Sequence[Message],
    turns: Sequence[int],
    full: str,
    render: Callable[..., str],
    render_prefixes: Callable[..., Prefixes | None],
) -> dict[int, tuple[int, int]]:
    """Of turns, how long what is given before each is, and what is said with it: the lengths of two renderings.

    Only of turns of which it is shown that `full` begins with what is said, and that with what is given.
    """
    last = turns[-1]
    given = render_prefixes(messages[:last], asks=True)
    said = render_prefixes(messages[: last + 1], asks=False) if given is not None else None
    if given is None or said is None:
        return {}
    # What was recorded is what is rendered without a record.
    if given.text != render(messages[:last], asks=True) or said.text != render(messages[: last + 1], asks=False):
        return {}
    known = {}
    said_is_full, given_is_said = common_length(said.text, full), common_length(given.text, said.text)
    for index in turns:
        before, with_it = given.first(index), said.first(index + 1)
        if before is None or with_it is None:
            continue
        if with_it.begins(Prefix(full, len(full)), said_is_full) and before.begins(with_it, given_is_said):
            known[index] = (len(before), len(with_it))
    return known


def split_last_turn(
    messages: Sequence[Message],
    *,
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str,
    add_generation_prompt: bool,
    tools: str = "",
    check_stop: Callable[[], None] = _never,
) -> list[Segment]:
    """The rendered conversation as what was given and, unless another answer is asked for, the last answer.

    Raises:
        WrongRow: the template refuses the conversation.
        RewrittenTurnError: what it writes for an answer does not follow what it asks it with.
    """
    render = partial(_render, tokenizer=tokenizer, chat_template=chat_template, tools=tools, check_stop=check_stop)
    if add_generation_prompt:
        return [(render(messages, asks=True), False)]
    given = render(messages[:-1], asks=True)
    full = render(messages, asks=False)
    if not full.startswith(given):
        raise RewrittenTurnError(
            "what the chat template asks for an answer with is not what it writes before that answer"
        )
    return [(given, False), (_without_space_behind(full[len(given) :]), True)]


def _without_space_behind(text: str) -> str:
    """The line break that templates write behind `<|im_end|>` comes after the model has stopped: nothing to learn."""
    return text.rstrip()


def _render(
    messages: Sequence[Message],
    *,
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str,
    tools: str,
    asks: bool,
    check_stop: Callable[[], None],
) -> str:
    if not messages:
        raise WrongRow(
            "the conversation begins with the assistant, and nothing asks for that answer "
            '(with `"weight": 0` it is given and not learned)'
        )
    fields = _fields(messages, tokenizer, chat_template)
    try:
        text = _apply(
            fields, json.loads(tools) if tools else None, tokenizer, chat_template, asks=asks, check_stop=check_stop
        )
    except (StopRequested, TemplateTooSlowError):
        raise
    except Exception as error:  # a template is a program from elsewhere: it may raise anything
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        line = f" (line {error.lineno} of the template)" if isinstance(error, TemplateSyntaxError) else ""
        raise WrongRow(f"the chat template refuses it: {kind}{str(error)[:500]}{line}") from None
    given = len(tools) + sum(len(json.dumps(one)) + 1_000 for one in fields)
    if len(text) > MOST_OF_A_TEMPLATE + 100 * given:
        raise WrongRow(f"the chat template makes {len(text):,} characters of {given:,}")
    return text


def _fields(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast, chat_template: str) -> list[JsonObject]:
    """Messages as the template wants them."""
    fields = [message.fields for message in messages]
    if any("tool_calls" in one for one in fields):
        form = _find_call_form(tokenizer, chat_template)
        fields = [_in_form(one, form) for one in fields]
    return fields


def _render_prefixes(
    messages: Sequence[Message],
    *,
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str,
    tools: str,
    asks: bool,
    check_stop: Callable[[], None],
) -> Prefixes | None:
    """`render_once`; None also where the template raises, which whoever renders next will say."""
    if not messages:
        return None
    fields, described = _fields(messages, tokenizer, chat_template), json.loads(tools) if tools else None
    try:
        return _bounded(lambda: render_once(fields, described, tokenizer, chat_template, asks), check_stop)
    except (StopRequested, TemplateTooSlowError):
        raise
    except Exception:
        return None


def _apply(
    fields: Sequence[JsonObject],
    tools: list[Any] | None,
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str,
    *,
    asks: bool,
    check_stop: Callable[[], None] = _never,
) -> str:
    return _bounded(
        lambda: str(
            tokenizer.apply_chat_template(
                list(fields), tools=tools, chat_template=chat_template, tokenize=False, add_generation_prompt=asks
            )
        ),
        check_stop,
    )


def _bounded(run: Callable[[], _T], check_stop: Callable[[], None]) -> _T:
    """What running a template gives. Raises `TemplateTooSlowError`, or what `check_stop` raises."""
    check_stop()
    try:
        with interruptible(SECONDS_OF_A_TEMPLATE, lambda: not _is_stopped(check_stop)):
            return run()
    except TookTooLong:
        check_stop()
        reason = f"the chat template has not come to an end after {SECONDS_OF_A_TEMPLATE:.0f} s"
        raise TemplateTooSlowError(reason) from None


def _is_stopped(check_stop: Callable[[], None]) -> bool:
    try:
        check_stop()
    except StopRequested:
        return True
    return False


@dataclass(frozen=True, slots=True)
class _CallForm:
    """How a template wants a call of a tool: its arguments as text or as an object, no content as null or as text."""

    has_text_arguments: bool = False
    has_null_content: bool = True


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


@lru_cache(maxsize=16)
def _find_call_form(tokenizer: PreTrainedTokenizerFast, chat_template: str) -> _CallForm:
    """What a template makes of a small call tells how it wants one: data have arguments in either form.

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
                    given = _apply(before, [_PROBED_TOOL], tokenizer, chat_template, asks=True)
                    text = _apply([*before, said], [_PROBED_TOOL], tokenizer, chat_template, asks=False)
                except TemplateTooSlowError:
                    return last or _CallForm()
                except Exception:  # noqa: S112  (it may raise anything, and then wants another form)
                    continue
                said_text = text.removeprefix(given)
                if "None" in said_text or "null" in said_text:
                    continue
                last = last or form
                if "{'k'" not in said_text and '{\\"k\\"' not in said_text:
                    return form
    return last or _CallForm()


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
