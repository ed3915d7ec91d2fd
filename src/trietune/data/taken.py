"""What a chat template takes of a conversation, and what it leaves out.

    {"role": "user", "content": "Hi", "name": "Ann"}     ->   <user>Hi        `name` is not taken

Templates know the keys of their model and pass over others in silence; some write no answer's reasoning, or no message
of a tool. Whoever brought them should hear of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from trietune.chat.conversation import Segment
from trietune.data.columns import WrongRow
from trietune.data.counts import Count
from trietune.data.encoder import Encoder
from trietune.data.examples import Example, Message
from trietune.data.messages import REASONING_KEYS

# A key that no template text of so many messages shows is one that the template does not know.
MESSAGES_TRIED = 8
_THOUGHTS = re.compile(r"<(think|thinking|reasoning)>(.*?)</\1>", re.DOTALL)


@dataclass(slots=True)
class LeftByTemplate:
    """Collects, over the rows of a split, what the chat template does not take."""

    encoder: Encoder
    reasoning: Count = field(default_factory=Count)
    text: Count = field(default_factory=Count)
    messages: Count = field(default_factory=Count)
    num_with_more: int = 0
    _keys: dict[str, Count] = field(default_factory=dict)
    _tried: dict[str, list[tuple[Example, int]]] = field(default_factory=dict)

    def add(self, place: str, example: Example, said: Sequence[Segment]) -> None:
        """Look at one example and what the template made of it."""
        self._add_answers(place, example, said)
        given = "".join(text for text, _ in said)
        unseen = [one for one in example.messages if one.role != "assistant" and not _is_in(one.content, given)]
        self.messages = self.messages.plus([place] * len(unseen))
        self.num_with_more += bool(example.tools) or any(message.more for message in example.messages)
        for name, index in _keys_of(example):
            self._keys[name] = self._keys.get(name, Count()).plus([place])
            tried = self._tried.setdefault(name, [])
            if len(tried) < MESSAGES_TRIED:
                tried.append((example, index))

    def unused_keys(self) -> dict[str, Count]:
        """Keys that change nothing in what the template writes, with the messages that have them."""
        return {
            name: count
            for name, count in self._keys.items()
            if not any(self._is_taken(name, example, index) for example, index in self._tried[name])
        }

    def _add_answers(self, place: str, example: Example, said: Sequence[Segment]) -> None:
        texts = [text for text, is_said in said if is_said]
        for message, text in zip(self.encoder.answers(example), texts, strict=True):
            thoughts = [match.group(2) for match in _THOUGHTS.finditer(message.content)]
            # Templates that put the mark that opens thoughts into the prompt leave only its end to the data.
            before, mark, _ = message.content.partition("</think>")
            thoughts += [before.removeprefix("<think>")] if mark and not thoughts else []
            # One of these is enough: transformers hands each on under all the names.
            thoughts += [str(message.fields[key]) for key in REASONING_KEYS if message.fields.get(key)][:1]
            if not all(_is_in(one, text) for one in thoughts):
                self.reasoning = self.reasoning.plus([place])
            elif not thoughts and not _is_in(message.content, text):
                self.text = self.text.plus([place])

    def _is_taken(self, name: str, example: Example, index: int) -> bool:
        without = replace(example, tools="") if index < 0 else _without_key(example, index, name)
        try:
            return self.encoder.said(without) != self.encoder.said(example)
        except WrongRow:  # the template insists on it
            return True


def check_answers(example: Example, said: Sequence[Segment], encoder: Encoder) -> None:
    """Raise `WrongRow` for an answer, or a call of tools, of which the template writes nothing."""
    texts = (text for text, is_said in said if is_said)
    for message, text in zip(encoder.answers(example), texts, strict=True):
        if message.content.strip() and message.weight and not text.strip():
            raise WrongRow("the chat template writes nothing of an answer: it would be learned as an empty one")
        if not message.more or message.content.strip():
            continue
        calls = message.fields.get("tool_calls") or ()
        names = [str((one.get("function") or one).get("name", "")) for one in calls]
        if names and not any(name in text for name in names):
            raise WrongRow(
                f"an answer calls `{names[0]}`, and the chat template writes nothing of it: it would be learned as an "
                "empty answer (take a `chat_template` that knows tools)"
            )


def _keys_of(example: Example) -> Iterator[tuple[str, int]]:
    """Each key of each message with the message's place, and `tools` with -1; reasoning is looked at by its text."""
    if example.tools:
        yield "tools", -1
    for index, message in enumerate(example.messages):
        if message.more:
            yield from ((key, index) for key in message.fields if key not in ("role", "content", *REASONING_KEYS))


def _without_key(example: Example, index: int, key: str) -> Example:
    message = example.messages[index]
    more = {name: value for name, value in json.loads(message.more).items() if name not in (key, "content")}
    changed: Message = replace(message, more=json.dumps(more, ensure_ascii=False) if more else "")
    return replace(example, messages=(*example.messages[:index], changed, *example.messages[index + 1 :]))


def _is_in(text: str, whole: str) -> bool:
    """Whether a text stands in another, as it is or as JSON writes it, whatever the spaces at its ends."""
    text = text.strip()
    return text in whole or json.dumps(text, ensure_ascii=False)[1:-1] in whole or json.dumps(text)[1:-1] in whole
