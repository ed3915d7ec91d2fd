"""Which columns of a row make an example, and how.

A row format is chosen once per data set, from its columns, its name and the templates that the user wrote, and then
applied to each row of it. The first of these that fits is taken:

    prompt_template, completion_template     the user's own words
    the name or the file's form              SST-2: sentence, label; SQuAD v2: context, question, answers
    input_ids, labels                        tokens made elsewhere
    messages                                 a conversation
    prompt, completion                       text as it is
    text                                     text as it is, learned from its first token on
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Literal

from trietune.data.examples import Example, Message, Task
from trietune.data.known_forms import find_known_form
from trietune.data.messages import is_conversation, read_messages, read_tools
from trietune.data.system_prompt import SYSTEM_ROLES
from trietune.data.templates import (
    SQUAD_PROMPT,
    SQUAD_TASK,
    SST2_PROMPT,
    SST2_TASK,
    UNANSWERABLE,
    PromptFormat,
    fill_template,
    find_columns,
    find_open_section,
    find_optional,
    find_optional_names,
    find_parts,
    find_unknown_names,
    to_text,
)
from trietune.errors import UserError
from trietune.io.json_types import JsonMapping

TaskName = Literal["sst2", "squad"]
RowFormatKind = Literal[
    "templates", "sst2", "squad", "tokens", "messages", "columns", "text", "answers", "answer_messages"
]  # fmt: skip

REQUIRED_COLUMNS: dict[RowFormatKind, tuple[str, ...]] = {
    "sst2": ("sentence", "label"),
    "squad": ("context", "question", "answers"),
    "tokens": ("input_ids", "labels"),
    "messages": ("messages",),
    "columns": ("prompt", "completion"),
    "text": ("text",),
}
# Columns that say by their names what they hold. Those of SST-2 and SQuAD do not: CoLA has the same as SST-2.
FORMS: tuple[RowFormatKind, ...] = ("tokens", "messages", "columns", "text")
_SST2_LABEL_OF: dict[object, int] = {0: 0, 1: 1, "0": 0, "1": 1, "negative": 0, "positive": 1}


# Columns of preferences, ranked answers and verdicts; `data/preferences.py` reads them.
_OF_PREFERENCES = ("prompt", "chosen", "rejected", "completions", "completion", "scores", "ranking", "label", "tools")
_ALSO_USED: dict[RowFormatKind, tuple[str, ...]] = {
    "tokens": ("attention_mask",),
    "squad": ("id",),
    "messages": ("tools", "system"),
}


class WrongRow(Exception):  # noqa: N818  (a value of the data, counted and located)
    """A row that was read, but cannot be an example; the text says why."""


class Unlabeled(WrongRow):
    """A row of a split that was published without its labels."""


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How a row becomes an example; plain values, so that a cache can be named after them."""

    kind: RowFormatKind
    prompt_template: str = ""
    completion_template: str = ""
    template_columns: tuple[str, ...] | None = None
    # Those that hold a conversation; of several, only the last is learned.
    message_columns: tuple[str, ...] = ("messages",)

    @property
    def task(self) -> Task:
        return {"sst2": SST2_TASK, "squad": SQUAD_TASK}.get(self.kind, Task(kind="text"))


def choose_row_format(
    columns: Sequence[str],
    *,
    task_name: TaskName | None,
    prompt_template: str | None,
    completion_template: str | None,
    source: str,
) -> RowFormat:
    """The row format for data with these columns.

    Args:
        task_name: the task that `dataset_id` names, if it names one.
        prompt_template, completion_template: the user's own; the settings allow both or neither.
        source: the file or data set, for messages.

    Raises:
        UserError: a template asks for a column that is not there, or nothing fits.
    """
    if prompt_template is not None and completion_template is not None:
        return _from_templates(columns, prompt_template, completion_template, source)
    if task_name is not None:
        missing = [name for name in REQUIRED_COLUMNS[task_name] if name not in columns]
        if missing:
            raise UserError(
                f"{quoted(missing)} missing in `{source}`, which is to be read as {_TASK_IN_WORDS[task_name]}",
                where=f"its columns are {quoted(columns)}",
                next_step=f"rename its columns to {quoted(REQUIRED_COLUMNS[task_name])}, or name no known data set in "
                "`dataset_id` and write `prompt_template` and `completion_template`",
            )
        return built_in_row_format(task_name)
    for kind in FORMS:
        if all(name in columns for name in REQUIRED_COLUMNS[kind]):
            return built_in_row_format(kind)
    if "conversations" in columns:
        return RowFormat("messages", message_columns=("conversations",))
    for name, looks_like in _TASK_IN_WORDS.items():
        if all(column in columns for column in REQUIRED_COLUMNS[name]):
            raise UserError(
                f"`{source}` has the columns of {looks_like}, and so has other data: it is not clear what to learn",
                where=f"its columns are {quoted(columns)}",
                next_step=_SAY_WHICH[name],
            )
    if {"chosen", "rejected"} <= set(columns) or {"prompt", "completions"} <= set(columns):
        raise UserError(
            f"`{source}` holds preferences, and `objective: sft` would learn one answer of each row",
            where=f"its columns are {quoted(columns)}",
            next_step="objective: dpo     (or write templates over its columns, to learn one answer all the same)",
        )
    if (form := find_known_form(columns)) is not None:
        # `input` of a first row without one may come later.
        names = (*form.required, *form.optional)
        return RowFormat("templates", form.prompt_template, form.completion_template, names)
    raise UserError(
        f"it is not clear what to learn from `{source}`",
        where=f"its columns are {quoted(columns)}",
        next_step=_advice(columns),
    )


def find_form(row: JsonMapping) -> RowFormatKind | None:
    """The form of one row by the columns in which it holds something; None if it has none of the known ones."""
    return next(
        (kind for kind in FORMS if all(row.get(name) is not None for name in REQUIRED_COLUMNS[kind])),
        None,
    )


def is_squad_row(row: JsonMapping) -> bool:
    """Whether `answers` is built as SQuAD builds it, which no other data does by chance."""
    answers = row.get("answers")
    return isinstance(answers, Mapping) and {"text", "answer_start"} <= set(answers)


def find_unused(columns: Sequence[str], row_format: RowFormat) -> tuple[str, ...]:
    """The columns that examples are not made of."""
    if row_format.kind == "templates":
        both = (row_format.prompt_template, row_format.completion_template)
        used = {name for one in both for name in find_columns(one, row_format.template_columns)}
    elif row_format.kind in ("answers", "answer_messages"):
        used = {*_OF_PREFERENCES, *find_columns(row_format.prompt_template, row_format.template_columns)}
    elif row_format.kind == "messages":
        used = {*row_format.message_columns, *_ALSO_USED["messages"]}
    else:
        used = {*REQUIRED_COLUMNS[row_format.kind], *_ALSO_USED.get(row_format.kind, ())}
    return tuple(name for name in columns if name not in used)


def example_maker(row_format: RowFormat) -> Callable[[JsonMapping, str], Example]:
    """The function from a row and its id to an example.

    It raises `WrongRow` for a row that cannot be one. Rows of `tokens` are made elsewhere: they need the tokenizer.
    """
    makers: dict[RowFormatKind, Callable[[RowFormat, JsonMapping, str], Example]] = {
        "templates": _make_from_templates,
        "sst2": _make_sst2,
        "squad": _make_squad,
        "messages": _make_conversation,
        "columns": _make_pair,
        "text": _make_text,
    }
    return partial(makers[row_format.kind], row_format)


def _from_templates(columns: Sequence[str], prompt_template: str, completion_template: str, source: str) -> RowFormat:
    templates = {"prompt_template": prompt_template, "completion_template": completion_template}
    names = check_templates(templates, columns, source)
    if not find_columns(completion_template, names):
        raise UserError(
            "`completion_template` names no column, so every example would have the same answer",
            where=f"`{source}` has the columns {quoted(columns)}",
            next_step='completion_template: " {column}"     (with the column that holds the answer)',
        )
    return RowFormat("templates", prompt_template, completion_template, names)


def check_templates(templates: Mapping[str, str], columns: Sequence[str], source: str) -> tuple[str, ...]:
    """The columns that templates may name, of which none is anything else; `templates` are by their keys.

    Raises:
        UserError: one asks for what is not a column, or for a part of one, or has half a section.
    """
    optional = [name for one in templates.values() for name in find_optional_names(one, columns)]
    columns = tuple(dict.fromkeys([*columns, *optional]))
    for key, template in templates.items():
        if (name := find_open_section(template, columns)) is not None:
            raise UserError(
                f"`{key}` has a section over `{name}` that does not begin or does not end",
                where=f"`{{#{name}}}` and `{{/{name}}}` belong together",
                next_step=f"{{#{name}}} ... {{/{name}}}     (what stands between is left out where `{name}` is empty)",
            )
        for name, column in find_parts(template, columns):
            raise UserError(
                f"`{key}` asks for a part of the column `{column}`: `{{{name}}}`",
                where="a template takes whole columns, whose values are texts or numbers",
                next_step=f"write `{{{column}}}`, or give the data a column that holds this part",
            )
        for name in find_unknown_names(template, columns):
            raise UserError(
                f"`{key}` asks for the column `{name}`, which `{source}` has not",
                where=f"its columns are {quoted(columns)}",
                next_step=_instead_of(name, columns),
            )
    text = "".join(templates.values())
    return tuple(name for name in columns if f"{{{name}}}" in text or name in optional)


def _instead_of(name: str, columns: Sequence[str]) -> str:
    """What to write in place of a name that is not a column: the nearest one, whatever its case and its spaces."""
    simple = {" ".join(column.lower().replace("_", " ").split()): column for column in reversed(columns)}
    wanted = " ".join(re.split("[!:]", name)[0].lower().replace("_", " ").split())
    near = get_close_matches(wanted, list(simple), n=1)
    return (
        f"did you mean `{{{simple[near[0]]}}}`?"
        if near
        else (f"write `{{{{{name}}}}}` if it is plain text, or `{{{name}?}}` if only some rows have it")
    )


def built_in_row_format(kind: RowFormatKind) -> RowFormat:
    """The row format that needs no words of the user's."""
    return RowFormat(kind, prompt_template={"sst2": SST2_PROMPT, "squad": SQUAD_PROMPT}.get(kind, ""))


def row_format_of_adapter(prompt_format: PromptFormat, columns: Sequence[str], source: str) -> RowFormat:
    """The row format for data with these columns in the templates that an adapter was trained with.

    Raises:
        UserError: they ask for columns that are not there.
    """
    templates = (prompt_format.prompt_template, prompt_format.completion_template)
    asked = [name for one in templates for name in find_columns(one, prompt_format.template_columns)]
    optional = {name for one in templates for name in find_optional(one, prompt_format.template_columns)}
    if missing := [name for name in dict.fromkeys(asked) if name not in columns and name not in optional]:
        raise UserError(
            f"{quoted(missing)} missing in `{source}`, which the templates of the adapter ask for",
            where=f"its columns are {quoted(columns)}",
            next_step=f"rename columns of the data to {quoted(missing)}",
        )
    return RowFormat("templates", *templates, template_columns=prompt_format.template_columns)


def find_built_in(prompt_format: PromptFormat) -> TaskName | None:
    """The built-in task that an adapter was trained on, by its prompt and its labels."""
    known: dict[TaskName, tuple[str, Task]] = {"sst2": (SST2_PROMPT, SST2_TASK), "squad": (SQUAD_PROMPT, SQUAD_TASK)}
    own = prompt_format.prompt_template, prompt_format.task
    return next((name for name, expected in known.items() if own == expected), None)


def _make_from_templates(row_format: RowFormat, row: JsonMapping, example_id: str) -> Example:
    completion = _fill(row_format.completion_template, row, row_format.template_columns)
    prompt = _fill(row_format.prompt_template, row, row_format.template_columns)
    return Example(id=example_id, prompt=prompt, completion=completion)


def _make_sst2(row_format: RowFormat, row: JsonMapping, example_id: str) -> Example:
    value = row.get("label")
    if isinstance(value, list | dict):
        raise WrongRow(f"label is a {type(value).__name__}, and 0 (negative) or 1 (positive) is needed")
    label = _SST2_LABEL_OF.get(value.strip() if isinstance(value, str) else value)
    if label is None:
        if str(value).strip() in ("-1", "None", "nan", ""):
            raise Unlabeled(f"label `{value}` stands for no label")
        raise WrongRow(f"label `{str(value)[:80]}` is neither 0 (negative) nor 1 (positive)")
    return Example(id=example_id, prompt=_fill(row_format.prompt_template, row), completion=SST2_TASK.labels[label])


def _make_squad(row_format: RowFormat, row: JsonMapping, example_id: str) -> Example:
    answers = _read_answers(row.get("answers"))
    completion = answers[0] if answers else UNANSWERABLE
    own_id = row.get("id")
    return Example(
        id=own_id if isinstance(own_id, str) and own_id else example_id,
        prompt=_fill(row_format.prompt_template, row),
        completion=completion,
        answers=answers,
    )


def _read_answers(value: object) -> tuple[str, ...]:
    """All gold answers: the hub's {"text": [...]}, the file's [{"text": ...}], a list of texts, or one text."""
    if isinstance(value, Mapping):
        value = value.get("text")
    if isinstance(value, str):
        return (value,) if value.strip() else ()
    if not isinstance(value, Sequence):
        raise WrongRow('`answers` is neither a list nor {"text": [...]}')
    texts: list[str] = []
    for item in value:
        text = item.get("text") if isinstance(item, Mapping) else item
        if not isinstance(text, str):
            raise WrongRow("`answers` holds something that is not text")
        texts.append(text)
    return tuple(texts)


def _make_conversation(row_format: RowFormat, row: JsonMapping, example_id: str) -> Example:
    try:
        messages, tools = _read_conversation(row_format.message_columns, row), read_tools(row.get("tools"))
    except TypeError as error:
        raise WrongRow(str(error)) from None
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=None)
    if last is None:
        roles = ", ".join(f"`{role}`" for role in dict.fromkeys(message.role for message in messages))
        raise WrongRow(f"no message has the role `assistant`, so there is nothing to learn (there are {roles})")
    # What follows the last answer carries no label and changes nothing.
    messages = messages[: last + 1]
    completion = messages[-1].content or messages[-1].more
    return Example(id=example_id, prompt="", completion=completion, messages=messages, tools=tools)


def conversation_to_ask(row: JsonMapping) -> tuple[Message, ...] | None:
    """The messages of a row that is asked, from the columns that training takes them from; None if it has none.

    Raises:
        TypeError: they cannot be read; the text says what is wrong.
    """
    column = next((name for name in ("messages", "conversations") if name in row), None)
    if column is not None:
        return _read_conversation((column,), row)
    if not any(is_conversation(row.get(name)) for name in ("prompt", "completion")):
        return None
    # Where training has an answer, asking has one too, or none yet.
    columns = ("prompt", "completion") if row.get("completion") is not None else ("prompt",)
    return _read_conversation(columns, row)


def _read_conversation(columns: Sequence[str], row: JsonMapping) -> tuple[Message, ...]:
    """The messages of a row; those before its last column are given, and a column `system` comes before all.

    Raises:
        TypeError: they cannot be read; the text says what is wrong.
    """
    messages: tuple[Message, ...] = ()
    for column in columns:
        value = row.get(column)
        # One message may stand for a list of one, and a text for what its column means.
        messages = tuple(replace(one, weight=0.0) if one.role == "assistant" else one for one in messages)
        if len(columns) > 1 and isinstance(value, str) and not value.lstrip().startswith("["):
            role = "assistant" if column == columns[-1] else "user"
            messages += (Message(role, value),)
        else:
            messages += read_messages([value] if isinstance(value, Mapping) else value, column)
    system = row.get("system")
    # NaN is what tables of numbers write where a value is missing.
    if system is None or system != system:
        return messages
    if not isinstance(system, str):
        raise TypeError(f"column `system` holds a {type(system).__name__}, and a text is needed")
    if not system.strip():
        return messages
    if messages[0].role not in SYSTEM_ROLES:
        return (Message("system", system), *messages)
    if messages[0].content.strip() != system.strip():
        raise TypeError("column `system` says something else than the system message: keep one of the two")
    return messages


def _make_pair(row_format: RowFormat, row: JsonMapping, example_id: str) -> Example:
    return Example(id=example_id, prompt=_text(row, "prompt"), completion=_text(row, "completion"))


def _make_text(row_format: RowFormat, row: JsonMapping, example_id: str) -> Example:
    return Example(id=example_id, prompt="", completion=_text(row, "text"))


def _fill(template: str, row: JsonMapping, columns: Sequence[str] | None = None) -> str:
    try:
        return fill_template(template, row, columns)
    except KeyError as error:
        raise WrongRow(f"no column `{error.args[0]}`") from None
    except TypeError as error:
        raise WrongRow(str(error)) from None


def _text(row: JsonMapping, column: str) -> str:
    if column not in row:
        raise WrongRow(f"no column `{column}`")
    try:
        return to_text(row[column], column)
    except TypeError as error:
        raise WrongRow(str(error)) from None


def _advice(columns: Sequence[str]) -> str:
    if "input_ids" in columns:
        return "give each row `labels`, a list as long as its `input_ids`: the token to learn at each place, else -100"
    texts = [name for name in columns if name.lower() not in ("id", "idx", "index")]
    if odd := [name for name in texts if set(name) & set("{}\r\n")]:
        return f"rename {quoted(odd)}: a template cannot ask for a name that holds braces or line breaks"
    if len(texts) >= 2:
        prompt = "".join(f"{name}: {{{name}}}\n" for name in texts[:-1])
        templates = (json.dumps(one, ensure_ascii=False) for one in (prompt, f"{{{texts[-1]}}}"))
        return "if `{}` is what is to be learned: prompt_template: {} and completion_template: {}".format(
            texts[-1], *templates
        )
    return (
        "write `prompt_template` and `completion_template` with {column} where a column belongs, or name the columns "
        "`prompt` and `completion`, `messages`, or `text`"
    )


def quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


_TASK_IN_WORDS: dict[TaskName, str] = {"sst2": "SST-2", "squad": "SQuAD v2"}
_SAY_WHICH: dict[TaskName, str] = {
    "sst2": "beside `train_file: FILE`, write `dataset_id: sst2` if it is SST-2 (0 is negative, 1 is positive); else "
    'two templates, such as `prompt_template: "{sentence}\\nLabel:"` and `completion_template: " {label}"`',
    "squad": "beside `train_file: FILE`, write `dataset_id: squad_v2` if it is SQuAD; else two templates, such as "
    '`prompt_template: "{context}\\n{question}\\nAnswer:"` and `completion_template: " {answers}"`',
}
