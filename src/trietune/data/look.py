"""Look at data of one's own, and say which keys train on it: for `trietune init FILE`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from trietune.config import load_config
from trietune.data.columns import RowFormat, choose_row_format
from trietune.data.reading import find_row_format
from trietune.data.sources import find_sources
from trietune.errors import UserError
from trietune.io.json_types import JsonMapping, JsonObject

# Keys that errors about files name, with the value that reads the file.
_NAMED = re.compile(r"(csv_separator|file_encoding): (\"[^\"]*\"|[\w.-]+)")
_IN_WORDS = {
    "messages": "conversations, put into words by the model's chat template",
    "columns": "prompts and completions, as they are",
    "text": "texts, learned from their first token on",
    "tokens": "tokens that were made elsewhere",
    "squad": "questions about paragraphs, as SQuAD has them",
    "templates": "columns put into a prompt and a completion",
}


def look_at(path: str, report: Callable[[str], None]) -> tuple[str, JsonObject]:
    """What the data is, in a line, and the keys that train on it.

    Where nothing says what is to be learned, the last column is, and `report` takes a line that asks to look at it.

    Raises:
        UserError: it cannot be read, or is data of another objective.
    """
    values: JsonObject = {"train_file": path}
    for _ in range(3):
        try:
            return _look(values, report)
        except UserError as error:
            # What a file does not say of itself, its error names: take that, and look again.
            named = _NAMED.search(error.next_step or "") or _NAMED.search(str(error))
            if named is None or named[1] in values:
                raise
            values[named[1]] = named[2].strip('"')
            report(f"{named[1]}: {named[2]}")
    raise AssertionError("two keys at most are named")


def _look(values: JsonMapping, report: Callable[[str], None]) -> tuple[str, JsonObject]:
    settings = load_config(None, dict(values), environ={})
    sources = find_sources(settings, report=report)
    rows = sources.train
    broken = next((row.reason for _, row in rows.read() if not isinstance(row, dict)), None)
    if broken is not None and _NAMED.search(broken):
        raise UserError(f"`{rows.name}` is {broken}", next_step=broken)
    columns = rows.columns()
    if {"chosen", "rejected"} <= set(columns) or {"prompt", "completions"} <= set(columns):
        return "Preferences: which of two answers is better.", {**values, "objective": "dpo"}
    if {"prompt", "completion", "label"} <= set(columns):
        return "Answers that are wanted or not.", {**values, "objective": "kto"}
    try:
        row_format, _ = find_row_format(settings, sources)
    except UserError:
        guessed = _guess(columns, rows.name)
        if guessed is None:
            raise
        row_format = guessed
        report(f"`{columns[-1]}` is taken for what is to be learned: change the two templates if it is not")
    found = dict(values)
    if row_format.kind == "templates":
        found |= {
            "prompt_template": row_format.prompt_template,
            "completion_template": row_format.completion_template,
        }
    return f"Data of your own: {_IN_WORDS.get(row_format.kind, 'rows')}.", found


def _guess(columns: list[str], source: str) -> RowFormat | None:
    """All columns but the last in the prompt, by their names, and the last one learned."""
    texts = [name for name in columns if name.lower() not in ("id", "idx", "index", "")]
    if len(texts) < 2 or any(set(name) & set("{}\r\n") for name in texts):
        return None
    prompt = "".join(f"{name}: {{{name}}}\n" for name in texts[:-1]) + f"{texts[-1]}:"
    return choose_row_format(
        texts, task_name=None, prompt_template=prompt, completion_template=f" {{{texts[-1]}}}", source=source
    )


def default_name(path: str) -> str:
    """The name of a configuration for such data: that of the file or folder."""
    name = Path(path.rstrip("/")).name.split(".")[0]
    return re.sub(r"[^\w-]+", "-", name).strip("-") or "own"
