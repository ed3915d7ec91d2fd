"""JSON that comes from disk or from a stranger: small, flat enough, without repeated keys, without NaN.

Python's reader takes `NaN`, keeps the last of two equal keys and recurses as deep as the text says. Each of the three
has been used to show one value to a check and another to the program.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from trietune.io.json_types import JsonObject

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 32


class NotStrict(ValueError):  # noqa: N818  (says what the text is)
    """The text is not JSON as we write it; the message names the reason."""


def parse(data: bytes, *, max_bytes: int = MAX_BYTES) -> Any:
    """The value that `data` holds. Raises `NotStrict`."""
    if len(data) > max_bytes:
        raise NotStrict(f"it has {len(data):,} bytes, more than the {max_bytes:,} allowed")
    _check_depth(data)
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
            parse_float=_parse_float,
        )
    except NotStrict:
        raise
    except UnicodeDecodeError as error:
        raise NotStrict(f"it is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise NotStrict(f"it is not JSON ({error})") from error


def serialize(value: object) -> bytes:
    """The one spelling that we write: sorted keys, two blanks, a line break at the end. Raises ValueError on NaN."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def without_nan(value: object) -> object:
    """The same value with NaN and infinities as None, since JSON has no word for them; tuples become lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value


def _check_depth(data: bytes) -> None:
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(data):
        byte = data[token.start()]
        if byte in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise NotStrict(f"it nests deeper than {MAX_DEPTH} levels")
        elif byte in b"]}":
            depth -= 1


# Possessive (`++`, `*+`): a long text must not leave one way back a letter.
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{}]', re.DOTALL)


def _unique_keys(pairs: list[tuple[str, object]]) -> JsonObject:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise NotStrict(f"the key {key[:80]!r} is there twice")
            seen.add(key)
    return result


def _refuse_constant(text: str) -> object:
    raise NotStrict(f"{text} is not JSON")


def _parse_int(text: str) -> int:
    if len(text) > 20:
        raise NotStrict(f"the number {text[:20]}... has {len(text):,} digits")
    return int(text)


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise NotStrict(f"the number {text[:20]} is too large")
    return value
