"""JSON that people and programs write, read so that nothing of it is dropped.

{"label": "1", "label": "0"}       Python's reader keeps the last; here it is `RepeatedKeyError`
"""

from __future__ import annotations

import json
from typing import Any

from trietune.io.json_types import JsonObject


class RepeatedKeyError(ValueError):
    """An object has a key twice, so it is not clear which value is meant."""

    def __init__(self, key: str) -> None:
        super().__init__(f"duplicate key `{key[:80]}`")


class RepeatedKeys(JsonObject):
    """An object that has `repeated` twice; it holds the last value, and must not be taken for a row."""

    def __init__(self, pairs: list[tuple[str, object]], repeated: str) -> None:
        super().__init__(pairs)
        self.repeated = repeated


class JsonDecoder:
    """Decodes one value after another."""

    def __init__(self) -> None:
        self._repeated: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._make_object)

    def decode(self, text: str) -> object:
        """The one value that `text` is.

        Raises:
            RepeatedKeyError: an object in it, at any depth, has a key twice.
            ValueError: no JSON, or something follows the value.
            RecursionError: nested too deeply.
        """
        value = self.decode_marked(text)
        if self._repeated is not None:
            raise RepeatedKeyError(self._repeated)
        return value

    def decode_marked(self, text: str) -> Any:
        """`decode`, with `RepeatedKeys` for the objects in which a key stands twice."""
        self._repeated = None
        return self._decoder.decode(text)

    def decode_at(self, text: str, position: int) -> tuple[object, str | None, int]:
        """The value that begins at `position`, a key that stands twice in an object of it, and where it ends."""
        self._repeated = None
        value, end = self._decoder.raw_decode(text, position)
        return value, self._repeated, end

    def _make_object(self, pairs: list[tuple[str, object]]) -> JsonObject:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        self._repeated = self._repeated or repeated
        return RepeatedKeys(pairs, repeated)


def decode_json(text: str) -> Any:
    """`JsonDecoder.decode` of one text."""
    return JsonDecoder().decode(text)
