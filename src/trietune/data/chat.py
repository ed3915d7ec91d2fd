"""Conversations of the data through a chat template, cut where the assistant speaks; see `trietune.chat.turns`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from trietune.chat import conversation as ask
from trietune.chat.process import cut
from trietune.data.columns import WrongRow
from trietune.data.examples import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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
    only_last: bool = False,
) -> list[ask.Segment]:
    """A conversation as alternating segments, text that is given and text that the assistant says.

    Args:
        add_generation_prompt: the last segment asks for the next answer; without it, the last one is an answer.
        only_last: all before the last answer is given, whether the assistant says it or not.
        check_stop: asked several times a second; what it raises passes through.

    Raises:
        WrongRow: the template refuses the conversation.
        RewrittenTurnError: it rewrites earlier turns as it continues.
        TemplateTooSlowError: it does not come to an end.
    """
    conversation = ask.Conversation(
        fields=[message.fields for message in messages],
        are_answers=[is_answer(message, index) for index, message in enumerate(messages)],
        tools=tools,
        asks=add_generation_prompt,
    )
    source = ask.TemplateSource(
        tokenizer.get_chat_template(chat_template, [{}] if tools else None),
        {name: _plain(token) for name, token in tokenizer.special_tokens_map.items()},
    )
    try:
        return cut(conversation, source, only_last=only_last, check_stop=check_stop)
    except ask.TooSlowError as error:
        raise TemplateTooSlowError(str(error)) from None
    except ask.RewrittenTurnError as error:
        raise RewrittenTurnError(str(error)) from None
    except ask.RefusedError as error:
        raise WrongRow(str(error)) from None


def _plain(token: object) -> object:
    return [str(one) for one in token] if isinstance(token, (list, tuple)) else str(token)
