"""Conversations as chat services and other tools write them.

    {"role": "assistant", "content": "Hello!", "weight": 0}                 an answer that is not learned
    {"role": "assistant", "content": null, "tool_calls": [...]}             a call of tools
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]}           parts of text, joined
    {"from": "gpt", "value": "Hello!"}                                      ShareGPT's words for the same

`weight`, `loss` and `train` say whether an answer is learned. Every other key goes to the chat template.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

from trietune.data.examples import Message
from trietune.data.json_text import RepeatedKeyError, decode_json
from trietune.io.json_types import JsonMapping, JsonObject

# What templates and data call the thoughts before an answer; transformers hands each on under all of these names.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_SWITCHES = ("loss", "train")
_OWN_KEYS = ("role", "content", "weight", *_SWITCHES)
# A part of these types is its text; OpenAI's newer interface names the two sides apart.
_TEXT_PARTS = ("text", "input_text", "output_text")
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "function_call": "assistant", "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip


def read_messages(value: object, column: str = "messages") -> tuple[Message, ...]:
    """Messages of a conversation: a list of {"role": ..., "content": ...}, or JSON text of one.

    Raises:
        TypeError: it is something else; the text says what.
    """
    # Parquet and CSV have no lists of objects of mixed kind: some data sets keep them as JSON text.
    value = _decoded(value, column, "messages")
    if not isinstance(value, Sequence) or not value:
        raise TypeError(f"column `{column}` is not a list of messages, or is empty")
    return tuple(_read_message(item, f"message {number} of `{column}`") for number, item in enumerate(value, start=1))


def read_tools(value: object) -> str:
    """The descriptions of tools that a row brings, as JSON; empty if it brings none.

    Raises:
        TypeError: they are not a list of objects.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    value = _decoded(value, "tools", "tools")
    if not isinstance(value, Sequence) or not all(isinstance(one, Mapping) for one in value):
        raise TypeError("column `tools` is not a list of objects")
    return _as_json(value) if value else ""


def is_conversation(value: object) -> bool:
    """Whether a value is meant as messages: an object, a list of objects, or JSON text of one."""
    if isinstance(value, str):
        return value.lstrip().startswith("[") and '"role"' in value
    return isinstance(value, Mapping) or (isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping))


def is_weight(value: object) -> bool:
    """Whether a value can multiply losses: any number that is finite."""
    # A whole number of JSON may be too large for a float; comparing the two is exact.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def has_weight(messages: object) -> bool:
    """Whether a message may have a weight; of JSON text, where nothing is lost by looking."""
    if isinstance(messages, str):
        return "weight" in messages or "\\u00" in messages
    if not isinstance(messages, Sequence):
        return False
    return any(isinstance(message, Mapping) and message.get("weight") is not None for message in messages)


def _decoded(value: object, column: str, what: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return decode_json(value)
    except RepeatedKeyError as error:
        raise TypeError(f"column `{column}` holds an object with a {error}") from None
    except (ValueError, RecursionError):
        raise TypeError(f"column `{column}` holds text that is not a JSON list of {what}") from None


def _read_message(item: object, where: str) -> Message:
    if isinstance(item, Mapping) and "from" in item and item.get("role") is None:
        item = _in_usual_words(item, where)
    if not isinstance(item, Mapping) or not isinstance(item.get("role"), str):
        raise TypeError(f'{where} has no "role"')
    if item.get("function_call"):
        raise TypeError(f'"function_call" of {where} is OpenAI\'s older form: write "tool_calls"')
    # Tables give every message all keys of all of them: what is null is not there.
    more = {key: value for key, value in item.items() if key not in _OWN_KEYS and value is not None}
    if item["role"] != "assistant":
        # Only answers are learned: what says otherwise is a key that nothing takes, and is counted as one.
        more |= {key: item[key] for key in ("weight", *_SWITCHES) if item.get(key)}
    more = _with_tool_calls(more, where)
    content = _text_of(item.get("content"), where)
    if content is None:
        if "tool_calls" not in more and not any(more.get(key) for key in REASONING_KEYS):
            raise TypeError(f'"content" of {where} is not text')
        more = {"content": None, **more}
    return Message(item["role"], content or "", _read_weight(item, where), _as_json(more) if more else "")


def _in_usual_words(item: JsonMapping, where: str) -> JsonObject:
    """A message of ShareGPT's form with `role` and `content`."""
    role = _SHAREGPT_ROLES.get(str(item["from"]).lower())
    if role is None:
        raise TypeError(f"{where} is from `{item['from']}`, and known are {', '.join(_SHAREGPT_ROLES)}")
    usual = {key: value for key, value in item.items() if key not in ("from", "value")}
    if str(item["from"]).lower() != "function_call":
        return {"role": role, "content": item.get("value"), **usual}
    call = _decoded(item.get("value"), "value", "calls")
    calls = call if isinstance(call, list) else [call]
    if not all(isinstance(one, Mapping) and "name" in one for one in calls):
        raise TypeError(f'"value" of {where} is not a call of a tool: {{"name": ..., "arguments": ...}}')
    made = [{"type": "function", "function": one} for one in calls]
    return {"role": role, "content": None, "tool_calls": made, **usual}


def _with_tool_calls(more: JsonObject, where: str) -> JsonObject:
    calls = _decoded(more.get("tool_calls"), "tool_calls", "calls")
    if not calls:
        return {key: value for key, value in more.items() if key != "tool_calls"}
    if not isinstance(calls, Sequence) or not all(isinstance(one, Mapping) for one in calls):
        raise TypeError(f'"tool_calls" of {where} is not a list of objects')
    return {**more, "tool_calls": list(calls)}


def _text_of(content: object, where: str) -> str | None:
    """Text, or parts of text joined; None if there is none."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise TypeError(f'"content" of {where} is not text')
    texts: list[str] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") or "text" if isinstance(part, Mapping) else type(part).__name__
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise TypeError(f'"content" of {where} has a part of the type `{kind}`, and only text can be learned from')
        texts.append(part["text"])
    return "".join(texts) if texts else None


def _read_weight(item: JsonMapping, where: str) -> float:
    weight = item.get("weight")
    if weight is not None and not is_weight(weight):
        raise TypeError(f'"weight" of {where} is not a number')
    for key in _SWITCHES:
        switch = item.get(key)
        if switch is None:
            continue
        if switch not in (True, False):
            raise TypeError(f'"{key}" of {where} is `{switch}`, neither true nor false')
        if weight is not None and bool(weight) != bool(switch):
            raise TypeError(f"{where} says both that it is learned and that it is not")
        weight = weight if switch and weight is not None else float(switch)
    return 1.0 if weight is None else float(weight)


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
