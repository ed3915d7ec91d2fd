"""The system message of conversations: put before those that have none, and found where all of them share one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trietune.data.examples import Example, Message

# What the first message of a conversation may be called when it is an instruction; OpenAI renamed theirs.
SYSTEM_ROLES = ("system", "developer")


def with_system_prompt(messages: Sequence[Message], prompt: str) -> Sequence[Message]:
    """`messages` with `prompt` as a system message in front, unless they have one or `prompt` is empty."""
    if not prompt or (messages and messages[0].role in SYSTEM_ROLES):
        return messages
    return (Message("system", prompt), *messages)


def common_system_prompt(examples: Iterable[Example]) -> str:
    """The system message that every conversation begins with; empty if they differ, or some have none."""
    common: str | None = None
    for example in examples:
        first = example.messages[0] if example.messages else None
        if first is None or first.role != "system" or (common is not None and first.content != common):
            return ""
        common = first.content
    return common or ""
