"""The part of YAML 1.2 that a flat configuration needs, with the line of every key.

Written against the events of ruamel.yaml's parser instead of its constructors, because three things must not happen
in silence: a repeated key whose last value wins, a tag that makes something of a value, and a scalar that YAML 1.1
understood otherwise (`6e-5` as text, `no` as False).

    6e-5 -> 6e-05     010 -> 10     no -> "no"     2026-01-01 -> "2026-01-01"     ~ -> None
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError, YAMLStreamError

_MAX_DEPTH = 16
_MAX_NUMBER = 100  # characters: Python refuses to print integers of thousands of digits

_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")
_NULL = {"", "~", "null", "Null", "NULL"}
_TRUE = {"true", "True", "TRUE"}
_FALSE = {"false", "False", "FALSE"}


class YamlError(Exception):
    """Text that is not a configuration: what is wrong, the line (from 1; None if it is about the whole), and a remedy.

    `key` is the key whose value it is about, where the rest of the file could be read.
    """

    def __init__(self, what: str, line: int | None, remedy: str) -> None:
        super().__init__(what)
        self.what = what
        self.line = line
        self.remedy = remedy
        self.key: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One `key: value` of the file, with the line of the key, from 1."""

    key: str
    value: object
    line: int


@dataclass(frozen=True, slots=True)
class Document:
    """The entries of a file in their order, repeated keys included, and what was refused but left the rest readable."""

    entries: tuple[Entry, ...]
    errors: tuple[YamlError, ...] = field(default=())


def read_mapping(text: str) -> Document:
    """The top-level mapping of a text. Raises `YamlError` where nothing can be read at all."""
    events = _Events(text)
    first = events.next_after("StreamStartEvent", "DocumentStartEvent")
    kind = type(first).__name__
    if kind in {"StreamEndEvent", "DocumentEndEvent"} or (kind == "ScalarEvent" and first.value in _NULL):
        raise YamlError("the file holds no key", None, "`trietune init sst2` writes a commented one")
    if kind != "MappingStartEvent":
        shown = "a list" if kind == "SequenceStartEvent" else "a single value"
        raise YamlError(f"the file holds {shown} instead of `key: value` lines", _line(first), "write `batch_size: 4`")
    entries: list[Entry] = []
    errors: list[YamlError] = []
    events.refuse_extras(first, errors)
    while type(event := events.next()).__name__ != "MappingEndEvent":
        num_errors = len(errors)
        events.refuse_extras(event, errors)
        if type(event).__name__ != "ScalarEvent":
            raise YamlError("a key is a list or a mapping", _line(event), "keys are plain words: `batch_size: 4`")
        value = events.value(events.next(), errors, depth=0)
        entries.append(Entry(event.value, value, _line(event)))
        for error in errors[num_errors:]:
            error.key = event.value
    if type(event := events.next_after("DocumentEndEvent")).__name__ != "StreamEndEvent":
        raise YamlError("a second document begins", _line(event), "one file holds one configuration: remove `---`")
    return Document(tuple(entries), tuple(errors))


def read_value(text: str) -> object:
    """One value, as after the colon of a line: a scalar, or a list or mapping in one line. Raises `YamlError`."""
    events = _Events(text)
    event = events.next_after("StreamStartEvent", "DocumentStartEvent")
    if type(event).__name__ in {"StreamEndEvent", "DocumentEndEvent"}:
        return None
    errors: list[YamlError] = []
    value = events.value(event, errors, depth=0)
    if errors:
        raise errors[0]
    if type(events.next_after("DocumentEndEvent")).__name__ != "StreamEndEvent":
        raise YamlError("it is more than one value", None, "put quotes around it")
    return value


def write_value(value: object) -> str:
    """A value as one line of YAML, in the spelling of the original's files: `True`, `null`, `"text"`, `[1, 2]`."""
    if value is None:
        return "null"
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float):
        return _write_float(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(write_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write_value(key)}: {write_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(str(value), ensure_ascii=False)


def _write_float(value: float) -> str:
    if not math.isfinite(value):
        return f"{value}".replace("inf", ".inf").replace("nan", ".nan")
    if 0 < abs(value) < 1e-3:
        return f"{Decimal(repr(value)).normalize():e}"  # 6e-5, as people write a learning rate
    return repr(value)


class _Events:
    """The parser's events one by one; errors of the parser become `YamlError`."""

    def __init__(self, text: str) -> None:
        self._errors = (MarkedYAMLError, YAMLError, YAMLStreamError, ValueError)
        self._stream: Iterator[object] = iter(YAML(typ="safe", pure=True).parse(text))
        self._text = text

    def next(self) -> Any:
        try:
            return next(self._stream)
        except StopIteration:
            raise YamlError("the file ends too early", None, "close what was opened") from None
        except self._errors as error:
            raise _explained(error, self._text) from None

    def next_after(self, *kinds: str) -> Any:
        """The first event that is of none of these kinds."""
        while type(event := self.next()).__name__ in kinds:
            pass
        return event

    def value(self, event: Any, errors: list[YamlError], depth: int) -> object:
        if depth > _MAX_DEPTH:
            raise YamlError("lists within lists within lists", _line(event), "no key has more than three levels")
        self.refuse_extras(event, errors)
        kind = type(event).__name__
        if kind == "ScalarEvent":
            return _scalar(event.value) if event.style is None else event.value
        if kind == "AliasEvent":
            return None
        if kind == "SequenceStartEvent":
            items = []
            while type(item := self.next()).__name__ != "SequenceEndEvent":
                items.append(self.value(item, errors, depth + 1))
            return items
        mapping: dict[object, object] = {}
        while type(key_event := self.next()).__name__ != "MappingEndEvent":
            if type(key_event).__name__ != "ScalarEvent":
                raise YamlError("a key is a list or a mapping", _line(key_event), "keys are plain words")
            self.refuse_extras(key_event, errors)
            if key_event.value in mapping:
                errors.append(YamlError(f"repeated key `{key_event.value}`", _line(key_event), "remove one of the two"))
            mapping[key_event.value] = self.value(self.next(), errors, depth + 1)
        return mapping

    @staticmethod
    def refuse_extras(event: Any, errors: list[YamlError]) -> None:
        tag = getattr(event, "tag", None)
        if tag is not None:
            shown = str(tag).replace("tag:yaml.org,2002:", "!!")
            errors.append(YamlError(f"tag `{shown}`", _line(event), "tags are not read here: write the plain value"))
        if type(event).__name__ == "AliasEvent":
            remedy = "anchors and aliases are not read here: write the value itself"
            errors.append(YamlError(f"alias `*{event.anchor}`", _line(event), remedy))
        elif getattr(event, "anchor", None) is not None:
            remedy = "anchors and aliases are not read here: write the value itself"
            errors.append(YamlError(f"anchor `&{event.anchor}`", _line(event), remedy))


def _scalar(text: str) -> object:
    """A plain scalar by the core schema of YAML 1.2."""
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if len(text) > _MAX_NUMBER:
        return text
    if _INT.fullmatch(text):
        return int(text)
    if _OCTAL.fullmatch(text):
        return int(text[2:], 8)
    if _HEX.fullmatch(text):
        return int(text[2:], 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITY.fullmatch(text):
        return float("-inf") if text.startswith("-") else float("inf")
    return float("nan") if _NAN.fullmatch(text) else text


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _explained(error: Exception, text: str) -> YamlError:
    """The parser's error in words for someone who knows no grammar of YAML."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = str(getattr(error, "problem", None) or error).split("\n")[0]
    line = mark.line + 1 if mark is not None else None
    source = text.splitlines()[mark.line] if mark is not None and mark.line < len(text.splitlines()) else ""
    if "\t" in source or "'\\t'" in problem:
        return YamlError("a tab where YAML allows only spaces", line, "put spaces in its place")
    if "mapping values are not allowed" in problem:
        return YamlError("a second colon", line, 'put text with a colon in quotes: `key: "a: b"`')
    if mark is not None and ("expected ',' or" in problem or "found unexpected end of stream" in problem):
        context = getattr(error, "context_mark", None)
        opened = context.line + 1 if context is not None else line
        return YamlError(
            "a list or a quotation that is not closed", opened, "close it with `]`, `}` or a quotation mark"
        )
    if "could not find expected ':'" in problem:
        context = getattr(error, "context_mark", None)
        return YamlError("a line without a colon", context.line + 1 if context else line, "write `key: value`")
    return YamlError(f"not valid YAML: {problem}", line, "write `key: value`, one per line")
