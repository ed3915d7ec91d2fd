"""Text that no file can hold as UTF-8: half of a pair of UTF-16, or a byte that was no text."""

from __future__ import annotations


def find_half_character(*texts: str) -> str | None:
    """The first half of a pair of UTF-16 in these texts, written `\\ud83d`; None if all can be written as UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"\\u{ord(text[error.start]):04x}"
    return None
