"""A training example as it reads, its label tokens marked."""

from __future__ import annotations

from rich.text import Text

from trietune.tracking import wording
from trietune.tracking.events import MarkedExample


def marked_text(example: MarkedExample) -> Text:
    """The example as it reads, each label token in brackets (and in color where there is any)."""
    text = Text()
    for piece, is_label in example.pieces:
        shown = wording.visible(piece)
        text.append(f"[{shown}]" if is_label else shown, style="bold green" if is_label else "")
    return text
