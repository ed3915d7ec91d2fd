"""How the rows of a source are read: chosen once, from their columns, the settings, and an adapter's prompt format."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

from trietune.config.settings import Settings
from trietune.data.columns import (
    FORMS,
    REQUIRED_COLUMNS,
    RowFormat,
    RowFormatKind,
    WrongRow,
    built_in_row_format,
    choose_row_format,
    example_maker,
    find_built_in,
    find_form,
    is_squad_row,
    row_format_of_adapter,
)
from trietune.data.examples import Example
from trietune.data.files import detect_format
from trietune.data.messages import is_conversation
from trietune.data.opening import BrokenRow
from trietune.data.preferences import AnswerForm, choose_form
from trietune.data.rows import FileRows, Rows
from trietune.data.sources import Sources
from trietune.data.templates import PromptFormat
from trietune.data.weights import COLUMN, Weighting, find_weighting
from trietune.errors import UserError
from trietune.io.json_types import JsonMapping

# Whether a template rewrites reasoning, and how it ends a call, is tried on so many conversations.
CONVERSATIONS_TRIED = 100


def first_conversations(rows: Rows, row_format: RowFormat) -> tuple[Example, ...]:
    """The first conversations of the data, for what must be known of it before it is read; unreadable ones left out."""
    if row_format.kind != "messages":
        return ()
    make = example_maker(row_format)
    found: list[Example] = []
    for place, row in islice(rows.read(), CONVERSATIONS_TRIED):
        if isinstance(row, BrokenRow):
            continue
        with contextlib.suppress(WrongRow):
            found.append(make(row, place))
    return tuple(found)


def _is_in_squads_form(rows: Rows, first: Any) -> bool:
    is_squad_file = isinstance(rows, FileRows) and all(detect_format(path) == "squad" for path in rows.paths)
    has_columns = isinstance(first, dict) and set(REQUIRED_COLUMNS["squad"]) <= set(first)
    return has_columns and find_form(first) is None and (is_squad_file or is_squad_row(first))


def in_words_of(prompt_format: PromptFormat, row_format: RowFormat, source: str) -> RowFormat:
    """The row format for the same rows in the words of an adapter's prompt format."""
    kinds = {"messages": "chat", "answer_messages": "chat", "tokens": "tokens"}
    kind = kinds.get(row_format.kind, "template")
    if kind != prompt_format.kind:
        in_words = {"chat": "conversations", "tokens": "tokens that the data brought", "template": "prompts"}
        raise UserError(
            f"the adapter was trained on {in_words[prompt_format.kind]}, and `{source}` holds {in_words[kind]}",
            next_step="evaluate it on data in the form that it was trained on",
        )
    return replace(
        row_format,
        prompt_template=prompt_format.prompt_template,
        completion_template=prompt_format.completion_template,
        template_columns=prompt_format.template_columns,
    )


def find_row_format(
    settings: Settings, sources: Sources, trained_with: PromptFormat | None = None
) -> tuple[RowFormat, AnswerForm | None]:
    """How rows become examples, and, where preferences are learned, how they become answers that are compared.

    What an adapter was trained with says more about the rows than their columns.
    """
    rows = sources.train
    columns = rows.columns()
    task_name = sources.task_name
    place, row = next(rows.read(), ("", None))
    if not columns:
        raise UserError(
            f"`{rows.name}` holds no rows" if row is None else f"no row of `{rows.name}` can be read",
            where=None if row is None else f"{place}: {getattr(row, 'reason', 'no columns')}",
            next_step="check that the file is the one that you mean",
        )
    if trained_with is not None and trained_with.kind == "template":
        own_task = find_built_in(trained_with)
        if own_task and set(REQUIRED_COLUMNS[own_task]) <= set(columns):
            return built_in_row_format(own_task), None
        if trained_with.completion_template:
            return row_format_of_adapter(trained_with, columns, rows.name), None
    if task_name and not sources.is_task_certain and not set(REQUIRED_COLUMNS[task_name]) <= set(columns):
        task_name = None
    if settings.learns_preferences:
        form = choose_form(
            columns,
            _first_row(rows),
            objective=settings.objective,
            prompt_template=settings.prompt_template,
            source=rows.name,
        )
        kind: RowFormatKind = "answer_messages" if form.is_chat else "answers"
        return RowFormat(kind, settings.prompt_template or "", template_columns=form.template_columns), form
    if task_name is None and settings.prompt_template is None and _is_in_squads_form(rows, row):
        task_name = "squad"
    row_format = choose_row_format(
        columns,
        task_name=task_name,
        prompt_template=settings.prompt_template,
        completion_template=settings.completion_template,
        source=rows.name,
    )
    first = _first_row(rows)
    own = find_form(first)
    if row_format.kind in FORMS and own is not None and FORMS.index(own) > FORMS.index(row_format.kind):
        row_format = built_in_row_format(own)  # the columns of another form are there and hold nothing
    if row_format.kind == "columns" and any(is_conversation(first.get(name)) for name in ("prompt", "completion")):
        row_format = replace(built_in_row_format("messages"), message_columns=("prompt", "completion"))
    if row_format.kind == "columns" and isinstance(first.get("label"), bool):
        raise UserError(
            f"`label` of `{rows.name}` says which completions are wanted, and `objective: sft` would learn all of them",
            where=f"its columns are {', '.join(f'`{name}`' for name in columns)}",
            next_step="objective: kto     (or remove the column `label`)",
        )
    return row_format, None


def weighting_of(
    settings: Settings, sources: Sources, row_format: RowFormat, report: Callable[[str], None]
) -> Weighting | None:
    if settings.objective == "sft":
        return find_weighting(sources.train, row_format)
    if COLUMN in sources.train.columns():
        report(f"the column `{COLUMN}` is not used: `objective: {settings.objective}` has no weights of examples")
    return None


def _first_row(rows: Rows) -> JsonMapping:
    return next((row for _, row in rows.read() if not isinstance(row, BrokenRow)), {})
