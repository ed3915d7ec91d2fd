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

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from trietune.data.columns import WrongRow
from trietune.data.examples import Message

Segment = tuple[str, bool]  # text, and whether it is to be learned

_PROBE = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))


class RewrittenTurnError(WrongRow):
    """An answer does not stand in the text of the whole conversation as it was given."""


def rewrites_turns(tokenizer: Any, chat_template: str) -> bool:
    """Whether the template rewrites earlier answers as a conversation continues."""
    # Some templates want a system message; what refuses both will be told by real conversations.
    for probe in (_PROBE, (Message("system", "s"), *_PROBE)):
        try:
            split_turns(probe, tokenizer=tokenizer, chat_template=chat_template, add_generation_prompt=False)
        except RewrittenTurnError:
            return True
        except WrongRow:
            continue
        return False
    return False


def split_turns(
    messages: Sequence[Message], *, tokenizer: Any, chat_template: str, add_generation_prompt: bool
) -> list[Segment]:
    """The rendered conversation as alternating segments, text that is given and text that is to be learned.

    With `add_generation_prompt` the last segment asks for the next answer; without it, the last one is an answer.

    Raises:
        WrongRow: the template refuses the conversation.
        RewrittenTurnError: it rewrites earlier turns as it continues.
    """
    full = _render(messages, tokenizer, chat_template, add_generation_prompt)
    segments: list[Segment] = []
    end = 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        given = _render(messages[:index], tokenizer, chat_template, True)
        is_last = index == len(messages) - 1 and not add_generation_prompt
        said = full if is_last else _render(messages[: index + 1], tokenizer, chat_template, False)
        if not (full.startswith(said) and said.startswith(given) and len(given) >= end):
            raise RewrittenTurnError(f"the chat template rewrites message {index + 1} once others follow")
        segments += [(full[end : len(given)], False), (_without_space_behind(full[len(given) : len(said)]), True)]
        end = len(given) + len(segments[-1][0])
    if add_generation_prompt:
        segments.append((full[end:], False))
    return segments


def split_last_turn(
    messages: Sequence[Message], *, tokenizer: Any, chat_template: str, add_generation_prompt: bool
) -> list[Segment]:
    """The rendered conversation as what was given and, unless another answer is asked for, the last answer.

    Raises:
        WrongRow: the template refuses the conversation.
        RewrittenTurnError: what it writes for an answer does not follow what it asks it with.
    """
    if add_generation_prompt:
        return [(_render(messages, tokenizer, chat_template, True), False)]
    given = _render(messages[:-1], tokenizer, chat_template, True)
    full = _render(messages, tokenizer, chat_template, False)
    if not full.startswith(given):
        raise RewrittenTurnError(
            "what the chat template asks for an answer with is not what it writes before that answer"
        )
    return [(given, False), (_without_space_behind(full[len(given) :]), True)]


def _without_space_behind(text: str) -> str:
    """The line break that templates write behind `<|im_end|>` comes after the model has stopped: nothing to learn."""
    return text.rstrip()


def _render(messages: Sequence[Message], tokenizer: Any, chat_template: str, add_generation_prompt: bool) -> str:
    if not messages:
        raise WrongRow("the conversation begins with the assistant, and nothing asks for that answer")
    try:
        return str(
            tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in messages],
                chat_template=chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )
    except Exception as error:  # a template is a program of somebody else's: it may raise anything
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        line = f" (line {error.lineno} of the template)" if isinstance(error, TemplateSyntaxError) else ""
        raise WrongRow(f"the chat template refuses it: {kind}{error}{line}") from None
