"""A frame that is drawn again and again in the output of a notebook's cell, through IPython's own display.

rich draws over itself on a terminal; a notebook has none, and rich's widget needs ipywidgets in the browser and in the
kernel. An output that is updated in place needs neither.
"""

from __future__ import annotations

import html
import io
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trietune.tracking.console.marked import marked_text
from trietune.tracking.events import MarkedExample
from trietune.tracking.terminal import write_text

if TYPE_CHECKING:
    from rich.text import Text

WIDTH = 100
SECONDS_BETWEEN_FRAMES = 0.25


def is_notebook() -> bool:
    """Whether what is printed goes to the output of a cell: of Jupyter, VS Code, Colab or Kaggle."""
    ipython = sys.modules.get("IPython")
    shell: object = ipython.get_ipython() if ipython is not None else None
    return shell is not None and getattr(shell, "kernel", None) is not None


class NotebookScreen:
    """As the terminal's screen: lines that pass, and one frame, which goes away when it is stopped."""

    width = WIDTH

    def __init__(self, frame: Callable[[int], list[Text]], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._frame = frame
        self._clock = clock
        self._handle: Any = None
        self._drawn_s = 0.0

    def start(self) -> None:
        """Draw the frame, unless it has just been drawn."""
        now = self._clock()
        if self._handle is not None and now - self._drawn_s < SECONDS_BETWEEN_FRAMES:
            return
        self._drawn_s = now
        self._show(self._lines())

    def stop(self) -> None:
        """Wipe the frame."""
        if self._handle is not None:
            self._show("")
            self._handle = None

    def print_marked(self, example: MarkedExample) -> None:
        """Show an example, its label tokens in color and in brackets."""
        text = marked_text(example)
        pieces = [
            f'<b style="color:green">[{html.escape(piece)}]</b>' if is_label else html.escape(piece)
            for piece, is_label in example.pieces
        ]
        _display({"text/plain": text.plain, "text/html": f"<pre>{''.join(pieces)}</pre>"})

    def print_styled(self, text: str, style: str) -> None:
        """A line that passes."""
        write_text(sys.stdout, text + "\n")

    def _lines(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        console = Console(file=out, width=WIDTH, force_terminal=False, force_jupyter=False, color_system=None)
        for line in self._frame(WIDTH):
            console.print(line, highlight=False, markup=False)
        return out.getvalue().rstrip("\n")

    def _show(self, text: str) -> None:
        data = {"text/plain": text, "text/html": f"<pre>{html.escape(text)}</pre>"}
        if self._handle is None:
            self._handle = _display(data, display_id=True)
        else:
            self._handle.update(data, raw=True)


def _display(data: dict[str, str], **options: object) -> object:
    from IPython.display import display

    return display(data, raw=True, **options)
