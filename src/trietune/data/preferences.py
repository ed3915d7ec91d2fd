"""Rows that say which answers are better: their columns, and the answers that they hold.

    prompt, chosen, rejected            a pair; texts, or lists of messages
    chosen, rejected                    the same, each with its prompt in it
    prompt, completions, scores         several answers; a higher score is better
    prompt, completions, ranking        several answers; 1 is best
    prompt, completion, label           one answer, wanted (true) or not (false)

A form is chosen once a data set, from its columns and first row, and applied to each row.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trietune.data.columns import WrongRow, check_templates
from trietune.data.examples import Example, Message
from trietune.data.messages import read_messages, read_tools
from trietune.data.templates import fill_template, to_text
from trietune.errors import UserError
from trietune.io.json_types import JsonMapping

FormKind = Literal["pairs", "ranked", "judged"]
PromptKind = Literal["column", "template", "implicit"]


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How a row's answers are read; plain values, so that a cache can be named after them.

    Attributes:
        kind: what the row says: a better and a worse answer, an order of several, or a verdict on one.
        is_chat: whether answers are messages.
        prompt: a column, a template over columns, or the beginning of the answers themselves.
        prompt_template: the template.
        template_columns: those that the template may name; None takes only identifiers.
        is_split: whether each answer of a pair is a row of its own, wanted or not.
    """

    kind: FormKind
    is_chat: bool
    prompt: PromptKind
    prompt_template: str = ""
    is_split: bool = False
    template_columns: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """The answers of one row, and how good each is; answers share the id."""

    examples: tuple[Example, ...]
    grades: tuple[float, ...]


def choose_form(
    columns: Sequence[str], first_row: JsonMapping, *, objective: str, prompt_template: str | None, source: str
) -> AnswerForm:
    """The form of data with these columns, for this objective.

    Raises:
        UserError: nothing fits, two forms could be meant, or the form does not suit the objective.
    """
    kind, answer = _kind(columns, objective, source)
    is_chat = _is_conversation(_first(first_row.get(answer)) if kind == "ranked" else first_row.get(answer))
    has_prompt = "prompt" in columns
    prompt: PromptKind = "column" if has_prompt else "implicit"
    template_columns: tuple[str, ...] | None = None
    if prompt_template is not None:
        if is_chat:
            raise UserError(
                f"`prompt_template` is set, and the answers of `{source}` are messages",
                next_step="remove it: the chat template of the model puts messages into words",
            )
        template_columns = check_templates({"prompt_template": prompt_template}, columns, source)
        prompt = "template"
    elif kind != "pairs" and not has_prompt:
        raise UserError(
            f"`{source}` has no column `prompt`",
            where=f"its columns are {_names(columns)}",
            next_step="rename the column that holds it, or write `prompt_template` with {column} where one belongs",
        )
    # Data sets with whole conversations in both answers often repeat the question in a column of text.
    if kind == "pairs" and is_chat and prompt == "column" and _repeats_prompt(first_row):
        prompt = "implicit"
    return AnswerForm(
        kind=kind,
        is_chat=is_chat,
        prompt=prompt,
        prompt_template=prompt_template or "",
        is_split=kind == "pairs" and objective == "kto",
        template_columns=template_columns,
    )


def _repeats_prompt(row: JsonMapping) -> bool:
    """Whether a row's prompt is a text, and its answers are conversations that begin with it."""
    if not isinstance(row.get("prompt"), str) or _is_conversation(row["prompt"]):
        return False
    try:
        return _messages(row.get("chosen"), "chosen")[0].role != "assistant"
    except TypeError:
        return False  # told, with its place, when the rows are read


def answer_reader(form: AnswerForm) -> Callable[[JsonMapping, str], list[AnswerRow]]:
    """The function from a row and its place to its answers: one row, or one for each answer of a pair.

    It raises `WrongRow` for a row that cannot be one.
    """
    readers = {"pairs": _read_pair, "ranked": _read_ranked, "judged": _read_judged}
    read = readers[form.kind]

    def answers(row: JsonMapping, place: str) -> list[AnswerRow]:
        try:
            found = read(form, row, place)
            tools = read_tools(row.get("tools")) if form.is_chat else ""
        except TypeError as error:
            raise WrongRow(str(error)) from None
        return [AnswerRow(tuple(replace(one, tools=tools) for one in row.examples), row.grades) for row in found]

    return answers


def _kind(columns: Sequence[str], objective: str, source: str) -> tuple[FormKind, str]:
    """What the rows say, and the column of an answer."""
    here = set(columns)
    if {"chosen", "rejected"} <= here:
        return "pairs", "chosen"
    if "completions" in here and here & {"scores", "ranking"}:
        if {"scores", "ranking"} <= here:
            raise UserError(
                f"`{source}` has both `scores` and `ranking`, and either could be meant",
                next_step="remove one of the two columns",
            )
        if objective == "kto":
            raise UserError(
                f"`objective: kto` learns from answers that are wanted or not, and `{source}` ranks several",
                next_step="objective: dpo     (or ipo, simpo, orpo, which compare them)",
            )
        return "ranked", "completions"
    if {"completion", "label"} <= here:
        if objective != "kto":
            raise UserError(
                f"`objective: {objective}` compares answers, and a row of `{source}` holds one, with a `label`",
                next_step="objective: kto     (or give each row `chosen` and `rejected`)",
            )
        return "judged", "completion"
    missing = next(
        (name for name in ("rejected", "chosen") if here & {"chosen", "rejected"} and name not in here), None
    )
    raise UserError(
        f"`objective: {objective}` learns from preferences, and `{source}` holds none"
        if missing is None
        else f"`{source}` has no column `{missing}`",
        where=f"its columns are {_names(columns)}",
        next_step="give each row `prompt`, `completion` and `label` (true or false), or `chosen` and `rejected`"
        if objective == "kto"
        else "give each row `prompt`, `chosen` and `rejected`, or `prompt`, `completions` and `scores`; "
        "`objective: sft` learns from examples without preferences",
    )


def _read_pair(form: AnswerForm, row: JsonMapping, place: str) -> list[AnswerRow]:
    answers = _read_chats(form, row, place) if form.is_chat else _read_texts(form, row, place)
    if not form.is_split:
        return [AnswerRow(answers, (1.0, 0.0))]
    chosen, rejected = answers
    return [
        AnswerRow((_renamed(chosen, f"{place} chosen"),), (1.0,)),
        AnswerRow((_renamed(rejected, f"{place} rejected"),), (-1.0,)),
    ]


def _read_texts(form: AnswerForm, row: JsonMapping, place: str) -> tuple[Example, Example]:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if form.prompt == "implicit":
        end = common_beginning(chosen, rejected)
        prompt, chosen, rejected = chosen[:end], chosen[end:], rejected[end:]
    else:
        prompt = _prompt_text(form, row)
    return Example(place, prompt, chosen), Example(place, prompt, rejected)


def _read_chats(form: AnswerForm, row: JsonMapping, place: str) -> tuple[Example, Example]:
    chosen, rejected = _messages(row.get("chosen"), "chosen"), _messages(row.get("rejected"), "rejected")
    if form.prompt == "column":
        prompt = _prompt_messages(row)
        chosen, rejected = prompt + chosen, prompt + rejected
    if chosen[:-1] != rejected[:-1]:
        raise WrongRow("`chosen` and `rejected` differ before their last message, and only that one is compared")
    return _conversation(chosen, "chosen", place), _conversation(rejected, "rejected", place)


def _read_ranked(form: AnswerForm, row: JsonMapping, place: str) -> list[AnswerRow]:
    completions = row.get("completions")
    if not isinstance(completions, Sequence) or isinstance(completions, str):
        raise WrongRow("`completions` is not a list")
    column = "scores" if row.get("scores") is not None else "ranking"
    values = row.get(column)
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(_is_number(one) for one in values):
        raise WrongRow(f"`{column}` is not a list of numbers")
    if len(values) != len(completions):
        raise WrongRow(f"{len(completions)} `completions` and {len(values)} `{column}`")
    sign = 1.0 if column == "scores" else -1.0
    if form.is_chat:
        prompt = _prompt_messages(row)
        answers = tuple(
            _conversation(prompt + _messages(one, "completions"), "completions", place) for one in completions
        )
    else:
        text = _prompt_text(form, row)
        answers = tuple(Example(place, text, to_text(one, "completions")) for one in completions)
    return [AnswerRow(answers, tuple(sign * float(one) for one in values))]


def _read_judged(form: AnswerForm, row: JsonMapping, place: str) -> list[AnswerRow]:
    label = row.get("label")
    verdict = {"true": True, "false": False}.get(label.strip().lower()) if isinstance(label, str) else label
    if verdict not in (True, False):  # 1 and 0 equal them
        raise WrongRow(f"`label` is `{label}`, neither true nor false")
    if form.is_chat:
        messages = _messages(row.get("completion"), "completion")
        example = _conversation(_prompt_messages(row) + messages, "completion", place)
    else:
        example = Example(place, _prompt_text(form, row), _text(row, "completion"))
    return [AnswerRow((example,), (1.0 if verdict else -1.0,))]


def common_beginning(first: str, second: str) -> int:
    """Characters of the beginning that both texts share, without a last word that is cut or the space before it."""
    shorter = min(len(first), len(second))
    end = next((place for place in range(shorter) if first[place] != second[place]), shorter)
    # The prompt ends with a whole word, and the space after it belongs to the answers, as models write it.
    while end and not (
        first[end - 1 : end].isspace() or first[end : end + 1].isspace() or second[end : end + 1].isspace()
    ):
        end -= 1
    while end and first[end - 1] == " ":
        end -= 1
    return end


def _prompt_text(form: AnswerForm, row: JsonMapping) -> str:
    if form.prompt == "column":
        return _text(row, "prompt")
    try:
        return fill_template(form.prompt_template, row, form.template_columns)
    except KeyError as error:
        raise WrongRow(f"no column `{error.args[0]}`") from None


def _prompt_messages(row: JsonMapping) -> tuple[Message, ...]:
    value = row.get("prompt")
    if isinstance(value, str) and not _is_conversation(value):
        return (Message("user", value),)
    return read_messages(value, "prompt")


def _messages(value: object, column: str) -> tuple[Message, ...]:
    return read_messages([value] if isinstance(value, Mapping) else value, column)


def _conversation(messages: tuple[Message, ...], column: str, place: str) -> Example:
    if messages[-1].role != "assistant":
        raise WrongRow(f"the last message of `{column}` has the role `{messages[-1].role}`, not `assistant`")
    return Example(place, "", messages[-1].content or messages[-1].more, messages=messages)


def _renamed(example: Example, name: str) -> Example:
    return replace(example, id=name)


def _text(row: JsonMapping, column: str) -> str:
    if row.get(column) is None:
        raise WrongRow(f"`{column}` is missing")
    return to_text(row[column], column)


def _is_conversation(value: object) -> bool:
    """Whether a value is messages: a list of objects with roles, or JSON text of one."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return False
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    if isinstance(value, Mapping):
        return "role" in value
    return isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping)


def _first(value: object) -> object:
    return value[0] if isinstance(value, Sequence) and not isinstance(value, str) and value else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
