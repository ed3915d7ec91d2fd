"""The text of the first messages of a conversation, as part of the text of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prefix:
    """The text `text[:end] + after`, without a copy."""

    text: str
    end: int
    after: str = ""

    def __len__(self) -> int:
        return self.end + len(self.after)

    def __str__(self) -> str:
        return self.text[: self.end] + self.after

    def begins(self, other: Prefix, shared: int) -> bool:
        """Whether `other` begins with this text, of which `text` begins with the same `shared` characters."""
        if self.end <= min(shared, other.end):
            until = self.end + len(self.after)
            there = other.text[self.end : min(until, other.end)] + other.after[: max(until - other.end, 0)]
            return there == self.after
        return str(other).startswith(str(self))


@dataclass(frozen=True, slots=True)
class Prefixes:
    """A rendered conversation with what its prefixes give.

    Attributes:
        text: of all messages.
        ends: where the text of the first `k` messages ends, `after` not counted; None where that was not shown.
        after: what follows the last message of every prefix.
    """

    text: str
    ends: Sequence[int | None]
    after: str

    def first(self, number: int) -> Prefix | None:
        """The text of the first `number` messages; None where it must be rendered."""
        end = self.ends[number]
        return None if end is None else Prefix(self.text, end, self.after)


def common_length(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        # What is before `low` is known to be alike.
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
