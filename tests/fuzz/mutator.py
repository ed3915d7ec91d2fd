"""Inputs that are nearly right: a real file with something in it that does not belong there.

Everything follows from one seed, so an input that was found once can be made again by its number.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

# What stands where something else belongs, by kind; each has broken a reader somewhere.
ODD_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**19,
    10**400,
    -(10**30),
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "\x00",
    "\ud83d",
    "a\nerror: b",
    "\x1b[2J",
    "x" * 5000,
    "ё",
    "0",
    "1",
    "null",
    "../../etc/passwd",
    "{",
    "{a}",
    "{{ a }}",
    "{% for",
    "%s",
    [],
    [[]],
    {},
    [None],
    [0, "a"],
    {"": None},
    {"a": {"b": [1]}},
    ["a", "a"],
    [[["x"]]],
]
ODD_BYTES = [
    b"\x00",
    b"\xff",
    b"\xed\xa0\xbd",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r",
    b'"',
    b"\\ud83d",
    b"[" * 3000,
    b"{" * 50,
    b"9" * 5000,
    b"NaN",
    b"1e999",
    b"\x7f",
    b"\t",
    b",",
    b"}",
    b"]",
    b"\xe2\x80\xa8",
]


class Mutator:
    """Mutations drawn one after the other from a seed."""

    def __init__(self, seed: int | str) -> None:
        self.draw = random.Random(seed)

    def of_bytes(self, data: bytes) -> bytes:
        """A few of: flip, cut, insert, repeat, remove, another's integer."""
        found = bytearray(data)
        for _ in range(self.draw.choice((1, 1, 1, 2, 5))):
            place = self.draw.randrange(len(found) + 1)
            span = self.draw.choice((1, 2, 4, 8, 64))
            match self.draw.randrange(7):
                case 0 if found:
                    found[place % len(found)] ^= 1 << self.draw.randrange(8)
                case 1:
                    del found[place:]
                case 2:
                    found[place:place] = self.draw.choice(ODD_BYTES)
                case 3:
                    found[place:place] = found[place : place + span]
                case 4:
                    del found[place : place + span]
                case 5:
                    found[place : place + 8] = self.draw.choice((0, 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1)).to_bytes(
                        8, "little"
                    )
                case _:
                    found[place : place + span] = self.draw.randbytes(span)
        return bytes(found)

    def of_value(self, value: Any) -> Any:
        """A copy of a JSON value in which one or two values, keys or items are others."""
        copy = json.loads(json.dumps(value))
        for _ in range(self.draw.choice((1, 1, 1, 2, 3))):
            copy = self._changed(copy)
        return copy

    def of_json(self, value: Any) -> bytes:
        """A JSON text that is odd in its values or, more seldom, in its bytes."""
        text = json.dumps(self.of_value(value), ensure_ascii=self.draw.random() < 0.7).encode("utf-8", "surrogatepass")
        return self.of_bytes(text) if self.draw.random() < 0.3 else text

    def of_json_lines(self, rows: list[Any]) -> bytes:
        """Some lines of them changed."""
        lines = []
        for row in rows:
            is_changed = self.draw.random() < 0.3
            lines.append(self.of_json(row) if is_changed else json.dumps(row).encode())
        return b"\n".join(lines) + b"\n"

    def choice(self, items: list[Any]) -> Any:
        return self.draw.choice(items)

    def _odd(self) -> Any:
        # A copy: what is changed in one input must not be in the next, nor end within itself.
        return deepcopy(self.draw.choice(ODD_VALUES))

    def _changed(self, value: Any) -> Any:
        spots = list(_spots(value))
        if not spots:
            return self._odd()
        holder, key = self.draw.choice(spots)
        action: Callable[[], object] = self.draw.choice(
            [
                lambda: holder.__setitem__(key, self._odd()),
                lambda: holder.__setitem__(key, self._odd()),
                lambda: holder.__setitem__(key, [holder[key]]),
                lambda: holder.__setitem__(key, {"a": holder[key]}),
                lambda: holder.__delitem__(key),
                lambda: self._swap(spots, holder, key),
                lambda: (
                    holder.__setitem__(str(self._odd()), holder[key])
                    if isinstance(holder, dict)
                    else holder.insert(key, self._odd())
                ),
            ]
        )
        action()
        return value

    def _swap(self, spots: list[tuple[Any, Any]], holder: Any, key: Any) -> None:
        other, place = self.draw.choice(spots)
        one, another = json.dumps(holder[key]), json.dumps(other[place])
        holder[key] = json.loads(another)
        other[place] = json.loads(one)


def _spots(value: Any) -> Any:
    """Every (container, key) of a JSON value."""
    stack = [value]
    while stack:
        holder = stack.pop()
        keys: Any = (
            holder.keys() if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        )
        for key in keys:
            yield holder, key
            if isinstance(holder[key], dict | list):
                stack.append(holder[key])
