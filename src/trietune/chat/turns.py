"""A rendered conversation, cut where the assistant speaks.

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
from collections.abc import Mapping, Sequence

from jinja2 import TemplateError, TemplateSyntaxError

from trietune.chat.conversation import Conversation, RefusedError, RewrittenTurnError, Segment
from trietune.chat.prefixes import Prefix, Prefixes, common_length
from trietune.chat.template import ChatTemplate
from trietune.io.half_characters import find_half_character

# Characters beyond a hundred times what it was given; tool descriptions of the longest templates have ten thousand.
MOST_OF_A_TEMPLATE = 1_000_000
# Of a conversation with as many answers, one rendering is asked for what its prefixes give.
MOST_TURNS_RENDERED_EACH = 8


def cut_turns(conversation: Conversation, template: ChatTemplate) -> list[Segment]:
    """The rendered conversation as alternating segments, text that is given and text that the assistant says.

    If the conversation asks, the last segment asks for the next answer; else the last one is an answer.

    Raises:
        RefusedError: the template cannot render the conversation.
        RewrittenTurnError: it rewrites earlier turns as it continues.
    """
    renderer = _Renderer(conversation, template)
    number = len(conversation.fields)
    full = renderer.text(number, asks=conversation.asks)
    turns = [index for index, is_answer in enumerate(conversation.are_answers) if is_answer]
    known: Mapping[int, tuple[int, int]] = {}
    if len(turns) >= MOST_TURNS_RENDERED_EACH:
        known = _lengths_from_one_rendering(turns, full, renderer)
    segments: list[Segment] = []
    end = 0
    for index in turns:
        is_last = index == number - 1 and not conversation.asks
        if index in known:
            given_length, said_length = known[index]
            is_rewritten = False
        else:
            given = renderer.text(index, asks=True)
            said = full if is_last else renderer.text(index + 1, asks=False)
            given_length, said_length = len(given), len(said)
            is_rewritten = not (full.startswith(said) and said.startswith(given))
        if is_rewritten or given_length < end:
            raise RewrittenTurnError(f"the chat template rewrites message {index + 1} once others follow")
        segments.append((full[end:given_length], False))
        segments.append((_without_space_behind(full[given_length:said_length]), True))
        end = given_length + len(segments[-1][0])
    if conversation.asks:
        segments.append((full[end:], False))
    return segments


def cut_last_turn(conversation: Conversation, template: ChatTemplate) -> list[Segment]:
    """The rendered conversation as what was given and, unless another answer is asked for, the last answer.

    Raises:
        RefusedError: the template cannot render the conversation.
        RewrittenTurnError: what it writes for an answer does not follow what it asks it with.
    """
    renderer = _Renderer(conversation, template)
    number = len(conversation.fields)
    if conversation.asks:
        return [(renderer.text(number, asks=True), False)]
    given = renderer.text(number - 1, asks=True)
    full = renderer.text(number, asks=False)
    if not full.startswith(given):
        raise RewrittenTurnError(
            "what the chat template asks for an answer with is not what it writes before that answer"
        )
    return [(given, False), (_without_space_behind(full[len(given) :]), True)]


def _lengths_from_one_rendering(turns: Sequence[int], full: str, renderer: _Renderer) -> dict[int, tuple[int, int]]:
    """Of turns, how long what is given before each is, and what is said with it: the lengths of two renderings.

    Only of turns of which it is shown that `full` begins with what is said, and that with what is given.
    """
    last = turns[-1]
    given = renderer.prefixes(last, asks=True)
    said = renderer.prefixes(last + 1, asks=False) if given is not None else None
    if given is None or said is None:
        return {}
    # What was recorded is what is rendered without a record.
    if given.text != renderer.text(last, asks=True) or said.text != renderer.text(last + 1, asks=False):
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


class _Renderer:
    """The first messages of a conversation as text."""

    def __init__(self, conversation: Conversation, template: ChatTemplate) -> None:
        self._template = template
        self._tools = json.loads(conversation.tools) if conversation.tools else None
        self._fields = template.with_calls(conversation.fields)
        self._sizes = [len(json.dumps(one)) + 1_000 for one in self._fields]
        self._tools_size = len(conversation.tools)

    def text(self, number: int, *, asks: bool) -> str:
        if not number:
            raise RefusedError(
                "the conversation begins with the assistant, and nothing asks for that answer "
                '(with `"weight": 0` it is given and not learned)'
            )
        try:
            text = self._template.render(self._fields[:number], self._tools, asks=asks)
        except MemoryError:
            raise
        except Exception as error:  # a template is a program from elsewhere: it may raise anything
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            line = f" (line {error.lineno} of the template)" if isinstance(error, TemplateSyntaxError) else ""
            raise RefusedError(f"the chat template refuses it: {kind}{str(error)[:500]}{line}") from None
        if half := find_half_character(text):
            raise RefusedError(f"the chat template writes half a character ({half})")
        given = self._tools_size + sum(self._sizes[:number])
        if len(text) > MOST_OF_A_TEMPLATE + 100 * given:
            raise RefusedError(f"the chat template makes {len(text):,} characters of {given:,}")
        return text

    def prefixes(self, number: int, *, asks: bool) -> Prefixes | None:
        return self._template.render_prefixes(self._fields[:number], self._tools, asks=asks)


def _without_space_behind(text: str) -> str:
    """The line break that templates write behind `<|im_end|>` comes after the model has stopped: nothing to learn."""
    return text.rstrip()
