"""What is asked of a chat template, and what can be answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trietune.io.json_types import JsonObject

# Text, and whether the assistant says it.
Segment = tuple[str, bool]


class RefusedError(Exception):
    """The template cannot render the conversation; the text says why."""


class RewrittenTurnError(RefusedError):
    """An answer does not stand in the text of the whole conversation as it was given."""


class TooSlowError(RefusedError):
    """The template did not come to an end."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as they are to be rendered.

    Attributes:
        fields: what the template sees of each message.
        are_answers: of each, whether something asks the assistant for it.
        tools: those that may be called, as the JSON text of a list; empty if there are none.
        asks: whether another answer is asked for behind the last message.
    """

    fields: Sequence[JsonObject]
    are_answers: Sequence[bool]
    tools: str = ""
    asks: bool = False


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """A chat template that has not been compiled.

    Attributes:
        text: in Jinja.
        special_tokens: of the tokenizer, by the names that templates know: `bos_token`.
    """

    text: str
    special_tokens: JsonObject
