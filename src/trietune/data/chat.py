"""Conversations through a chat template, cut where the assistant speaks.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n      what the model is given
    Hello!<|im_end|>                                            what it has to say: labels
    \\n<|im_start|>user\\nAnd?<|im_end|>\\n<|im_start|>assistant\\n
    Well.<|im_end|>                                             labels

A turn begins where the template, given all that went before, asks for an answer. So what the model is given in training
is, character for character, what it is given in use.

Some templates write an answer anew once others follow it: those of reasoning models drop its thoughts. Then no single
text holds all answers as they were given, and each turn becomes an example of its own. The trie computes what they
share once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from trietune.data.columns import WrongRow
from trietune.data.examples import Message
from trietune.data.interruptible import TookTooLong, interruptible
from trietune.errors import StopRequested

Segment = tuple[str, bool]  # text, and whether it is to be learnt

# Of one conversation: templates of a hundred lines take milliseconds.
SECONDS_OF_A_TEMPLATE = 20.0
# Characters beyond a hundred times what it was given; tool descriptions of the longest templates have ten thousand.
MOST_OF_A_TEMPLATE = 1_000_000

_PROBE = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))


class TemplateTooSlowError(WrongRow):
    """The template did not come to an end."""


class RewrittenTurnError(WrongRow):
    """An answer does not stand in the text of the whole conversation as it was given."""


def _never() -> None:
    """No stop is asked for."""


def rewrites_turns(tokenizer: Any, chat_template: str, check_stop: Callable[[], None] = _never) -> bool:
    """Whether the template writes earlier answers anew as a conversation goes on."""
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
            return False  # whoever uses it next says so
        except RewrittenTurnError:
            return True
        except WrongRow:
            continue
        return False
    return False


def split_turns(
    messages: Sequence[Message],
    *,
    tokenizer: Any,
    chat_template: str,
    add_generation_prompt: bool,
    check_stop: Callable[[], None] = _never,
) -> list[Segment]:
    """The rendered conversation as alternating segments, text that is given and text that is to be learnt.

    With `add_generation_prompt` the last segment asks for the next answer; without it, the last one is an answer.

    Raises:
        WrongRow: the template refuses the conversation.
        RewrittenTurnError: it writes earlier turns anew as it goes on.
    """
    render = partial(_render, check_stop=check_stop)
    full = render(messages, tokenizer, chat_template, add_generation_prompt)
    segments: list[Segment] = []
    end = 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        given = render(messages[:index], tokenizer, chat_template, True)
        is_last = index == len(messages) - 1 and not add_generation_prompt
        said = full if is_last else render(messages[: index + 1], tokenizer, chat_template, False)
        if not (full.startswith(said) and said.startswith(given) and len(given) >= end):
            raise RewrittenTurnError(f"the chat template writes message {index + 1} anew once others follow")
        segments += [(full[end : len(given)], False), (_without_space_behind(full[len(given) : len(said)]), True)]
        end = len(given) + len(segments[-1][0])
    if add_generation_prompt:
        segments.append((full[end:], False))
    return segments


def split_last_turn(
    messages: Sequence[Message],
    *,
    tokenizer: Any,
    chat_template: str,
    add_generation_prompt: bool,
    check_stop: Callable[[], None] = _never,
) -> list[Segment]:
    """The rendered conversation as what was given and, unless another answer is asked for, the last answer.

    Raises:
        WrongRow: the template refuses the conversation.
        RewrittenTurnError: what it writes for an answer does not follow what it asks it with.
    """
    render = partial(_render, check_stop=check_stop)
    if add_generation_prompt:
        return [(render(messages, tokenizer, chat_template, True), False)]
    given = render(messages[:-1], tokenizer, chat_template, True)
    full = render(messages, tokenizer, chat_template, False)
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
    tokenizer: Any,
    chat_template: str,
    add_generation_prompt: bool,
    *,
    check_stop: Callable[[], None],
) -> str:
    if not messages:
        raise WrongRow("the conversation begins with the assistant, and nothing asks for that answer")
    check_stop()
    try:
        with interruptible(SECONDS_OF_A_TEMPLATE, lambda: not _is_stopped(check_stop)):
            text = str(
                tokenizer.apply_chat_template(
                    [{"role": message.role, "content": message.content} for message in messages],
                    chat_template=chat_template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
    except TookTooLong:
        check_stop()
        raise TemplateTooSlowError(
            f"the chat template has not come to an end after {SECONDS_OF_A_TEMPLATE:.0f} s"
        ) from None
    except Exception as error:  # a template is a program of somebody else's: it may raise anything
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        line = f" (line {error.lineno} of the template)" if isinstance(error, TemplateSyntaxError) else ""
        raise WrongRow(f"the chat template refuses it: {kind}{str(error)[:500]}{line}") from None
    given = sum(len(message.role) + len(message.content) + 1_000 for message in messages)
    if len(text) > MOST_OF_A_TEMPLATE + 100 * given:
        raise WrongRow(f"the chat template makes {len(text):,} characters of {given:,}")
    return text


def _is_stopped(check_stop: Callable[[], None]) -> bool:
    try:
        check_stop()
    except StopRequested:
        return True
    return False
