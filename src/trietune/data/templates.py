"""The text that an example becomes, and the record of it that travels with an adapter (`prompt_format.json`).

    "Review: {sentence}\\nOutput:"  +  {"sentence": "fine"}   ->   "Review: fine\\nOutput:"

`{name?}` is a column that may be missing, and `{#name}...{/name}` stands only where the column holds something.
`{name}` is a column, spelt exactly as in the data; `{{name}}` is that text itself; every other brace is a brace, so a
template may hold JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Literal

from trietune.data.examples import Task
from trietune.data.json_text import decode_json
from trietune.errors import UserError
from trietune.io.half_characters import find_half_character
from trietune.io.json_types import JsonMapping, JsonObject

SST2_PROMPT = "Review: {sentence}\nOutput:"
SST2_LABELS = ("negative", "positive")
SST2_TASK = Task(
    kind="labels",
    labels=tuple(f' {{"label": "{name}"}}' for name in SST2_LABELS),
    label_names=SST2_LABELS,
)

SQUAD_PROMPT = "\nContext: {context}\n\nQuestion: {question}\n\nAnswer:\n"
UNANSWERABLE = "unanswerable"
SQUAD_TASK = Task(kind="answers")

FORMAT_VERSION = 1
# Of templates with columns that may be missing, which the first version took for text.
FORMAT_VERSION_OPTIONAL = 2
# Of adapters that were trained on several data sets, each with a form of its own.
FORMAT_VERSION_SEVERAL = 3
_SECTION = re.compile(r"\{#([^{}\r\n]+)\}(.*?)\{/\1\}", re.DOTALL)
_MAYBE = re.compile(r"\{([^{}\r\n]+)\?\}")
_BRACES = re.compile(r"\{\{([^{}\r\n]+)\}\}|\{([^{}\r\n]+)\}")
# What is meant as a column, right or wrong: `Review Text`, and what Python's own templates allow behind a name.
_NAME = re.compile(r"(?=.*\w)[\w \t-]+(![a-z])?(:[^\"']*)?")
# What Python's own templates write for a part of a value: `{answers[0]}`, `{review.text}`.
_PART = re.compile(r"(\.\w+|\[[^\[\]]*\])+(![a-z])?(:[^\"']*)?")
# What adapters without `template_columns` were trained with: identifiers are columns, everything else is text.
_IDENTIFIERS = re.compile(r"\{\{(\w+)\}\}|\{([A-Za-z_]\w*)\}")

Piece = tuple[str, bool]  # text, or the name of a column and True


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How text becomes token ids: the same in training, evaluation and use.

    Attributes:
        kind: `template`: a prompt and a completion; `chat`: messages through `chat_template`; `tokens`: the data
            brought its own token ids.
        prompt_template: the prompt's part of a `template`; empty if the data holds whole prompts or none.
        completion_template: the completion's part of a `template`; empty for the built-in tasks, which have
            no single one.
        chat_template: Jinja source of a `chat`.
        parses_special_tokens: whether the text of a special token, such as `<eos>`, becomes that token. Only where a
            template, or data that was rendered elsewhere, may mean it; a review that says `<eos>` stays text.
        bos_id: put before every prompt, exactly once; None for none.
        eos_id: after every completion.
        stop_ids: generation ends at any of them.
        task: what a right answer is.
        tokenizer_hash: SHA-256 of the tokenizer, see `trietune.data.encoder.hash_tokenizer`.
        is_turn_by_turn: for a `chat`, whether each answer is an example of its own, because the template writes earlier
            answers anew; else all answers of a conversation are learned in one.
        system_prompt: of a `chat`, put before conversations that have no system message; empty for none. It is
            `chat_system_prompt`, or the one that all training conversations had.
        template_columns: for a `template`, the columns that both templates may name; None takes only identifiers, as
            the first adapters did.
        source: of one of several data sets, its name.
        others: the formats of all data sets that an adapter was trained on, if there were several; what is asked
            without more is asked in this one.
    """

    kind: Literal["template", "chat", "tokens"]
    prompt_template: str
    completion_template: str
    chat_template: str
    parses_special_tokens: bool
    bos_id: int | None
    eos_id: int
    stop_ids: tuple[int, ...]
    task: Task
    tokenizer_hash: str
    is_turn_by_turn: bool = False
    template_columns: tuple[str, ...] | None = None
    system_prompt: str = ""
    source: str = ""
    others: tuple[PromptFormat, ...] = ()

    def _check_kinds(self) -> None:
        """Raise ValueError for a value of another kind than `to_json` writes."""
        texts = (
            self.prompt_template, self.completion_template, self.chat_template, self.system_prompt, self.tokenizer_hash,
            self.source,
        )  # fmt: skip
        names = (*self.task.labels, *self.task.label_names, *(self.template_columns or ()))
        flags = (self.parses_special_tokens, self.is_turn_by_turn)
        ids = (self.eos_id, *self.stop_ids, *(() if self.bos_id is None else (self.bos_id,)))
        if self.kind not in ("template", "chat", "tokens") or self.task.kind not in ("labels", "answers", "text"):
            raise ValueError("its kind, or that of its task, is not known")
        if not all(isinstance(text, str) for text in (*texts, *names)) or find_half_character(*texts, *names):
            raise ValueError("a text in it is no text")
        if not all(isinstance(flag, bool) for flag in flags) or not all(type(one) is int and one >= 0 for one in ids):
            raise ValueError("a flag in it is no flag, or a token no number")
        if len(self.task.labels) != len(self.task.label_names) or len(set(self.task.labels)) < len(self.task.labels):
            raise ValueError("its labels and their names do not fit together")
        if self.task.kind == "labels" and not all(self.task.labels):
            raise ValueError("a label of it is empty")

    @property
    def columns(self) -> tuple[str, ...]:
        """The names that the prompt template asks for, in its order."""
        return find_columns(self.prompt_template, self.template_columns)

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Those of them that may be missing."""
        return find_optional(self.prompt_template, self.template_columns)

    @property
    def any_chat_template(self) -> str:
        """The chat template that was trained with, by this data set or by another one; empty without conversations."""
        return next((one.chat_template for one in (self, *self.others) if one.chat_template), "")

    def to_json(self) -> str:
        version = FORMAT_VERSION_OPTIONAL if self.optional_columns else FORMAT_VERSION
        fields = {"format_version": FORMAT_VERSION_SEVERAL if self.others else version, **plain_fields(self)}
        if self.others:
            fields["others"] = [plain_fields(one) for one in self.others]
        return json.dumps(fields, ensure_ascii=False, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str = "prompt_format.json") -> PromptFormat:
        """The opposite of `to_json`.

        Raises:
            UserError: not such a record, or one of a later version.
        """
        try:
            fields = decode_json(text.decode() if isinstance(text, bytes) else text)
            version = fields.pop("format_version")
            if version in (FORMAT_VERSION, FORMAT_VERSION_OPTIONAL, FORMAT_VERSION_SEVERAL):
                others = tuple(cls._from_fields(one) for one in fields.pop("others", ()))
                return replace(cls._from_fields(fields), others=others)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                "the prompt format cannot be read: it is not what TrieTune writes beside an adapter",
                where=f"{where} ({error})",
                next_step="take the adapter folder again from the run that made it",
            ) from None
        raise UserError(
            f"the prompt format has version {version}; this TrieTune reads versions up to {FORMAT_VERSION_SEVERAL}",
            where=where,
            next_step="pip install --upgrade trietune",
        )

    @classmethod
    def _from_fields(cls, fields: JsonObject) -> PromptFormat:
        task = fields.pop("task")
        columns = fields.pop("template_columns", None)
        found = cls(
            **{**fields, "stop_ids": tuple(fields["stop_ids"])},
            template_columns=None if columns is None else tuple(columns),
            task=Task(task["kind"], tuple(task["labels"]), tuple(task["label_names"])),
        )
        found._check_kinds()
        return found


def plain_fields(prompt_format: PromptFormat) -> JsonObject:
    """Its fields as plain values, without those that only several data sets have where there are none."""
    fields = asdict(replace(prompt_format, others=()))
    del fields["others"]
    if not prompt_format.source:
        del fields["source"]
    return fields


def fill_template(template: str, row: JsonMapping, columns: Collection[str] | None = None) -> str:
    """The template with its columns put in; a missing value (None) is empty text.

    Args:
        columns: those of the data; None takes every identifier in braces for one.

    Raises:
        KeyError: the row has no such column; its argument is the name.
        TypeError: the value is a list or an object.
    """
    optional = find_optional(template, columns)
    if optional:
        template = _opened(template, optional, lambda name: bool(to_text(row.get(name), name).strip()))
    pieces = _split(template, None if columns is None else frozenset(columns))
    return "".join(
        to_text(row.get(text) if text in optional else row[text], text) if is_column else text
        for text, is_column in pieces
    )


def find_optional(template: str, columns: Collection[str] | None) -> tuple[str, ...]:
    """The columns that a template says may be missing; none where `columns` is None, as in the first adapters."""
    if columns is None:
        return ()
    named = [name for name, _ in _SECTION.findall(template) if name in columns]
    named += [name for name in _MAYBE.findall(template) if name in columns and f"{name}?" not in columns]
    return tuple(dict.fromkeys(named))


def find_optional_names(template: str, columns: Collection[str]) -> tuple[str, ...]:
    """What a template marks as a column that may be missing, whether the data has it or not."""
    named = [name for name, _ in _SECTION.findall(template) if _NAME.fullmatch(name) or name in columns]
    named += [
        name
        for name in _MAYBE.findall(template)
        if f"{name}?" not in columns and (_NAME.fullmatch(name) or name in columns)
    ]
    return tuple(dict.fromkeys(named))


def find_open_section(template: str, columns: Collection[str]) -> str | None:
    """The name of a section over a column that is begun and not ended, or ended and not begun."""
    rest = _SECTION.sub(r"\2", template)
    found = re.findall(r"\{[#/]([^{}\r\n]+)\}", rest)
    return next((name for name in found if name in columns), None)


def _opened(template: str, optional: Collection[str], has: Callable[[str], bool]) -> str:
    """The template with plain names in place of those that may be missing, and without sections that do not stand."""

    def section(match: re.Match[str]) -> str:
        name, body = match.groups()
        if name not in optional:
            return match.group()
        return _opened(body, optional, has) if has(name) else ""

    template = _SECTION.sub(section, template)
    return _MAYBE.sub(lambda match: f"{{{match[1]}}}" if match[1] in optional else match.group(), template)


def find_columns(template: str, columns: Collection[str] | None = None) -> tuple[str, ...]:
    """The columns that a template asks for, each once, in its order."""
    return tuple(dict.fromkeys(text for text, is_column in split_template(template, columns) if is_column))


def find_unknown_names(template: str, columns: Collection[str]) -> tuple[str, ...]:
    """What stands in braces like the name of a column, and is none of `columns`."""
    names = (name for _, name in _BRACES.findall(template) if name)
    return tuple(dict.fromkeys(name for name in names if name not in columns and _NAME.fullmatch(name)))


def find_parts(template: str, columns: Collection[str]) -> tuple[tuple[str, str], ...]:
    """What stands in braces like a part of a column's value, with the column: `answers[0]`, `answers`."""
    found: dict[str, str] = {}
    for _, name in _BRACES.findall(template):
        whole = [one for one in columns if name.startswith(one) and _PART.fullmatch(name, len(one))]
        if whole and name not in columns:
            found[name] = max(whole, key=len)
    return tuple(found.items())


def find_text_in_braces(template: str, columns: Collection[str]) -> tuple[str, ...]:
    """What stands in braces and is not a column, a name or JSON: text, though it may have been meant otherwise."""
    optional = find_optional_names(template, columns)
    marks = {f"{mark}{name}{end}" for name in optional for mark, end in (("", "?"), ("#", ""), ("/", ""))}
    found = [name for _, name in _BRACES.findall(template) if name]
    found = [name for name in found if name not in columns and name not in marks and not set(name) & {'"', "'"}]
    return tuple(dict.fromkeys([*found, *([""] if "{}" in template and '"' not in template else [])]))


def literal_text(template: str, columns: Collection[str] | None = None) -> str:
    """What of a template is text of its own."""
    return "".join(text for text, is_column in split_template(template, columns) if not is_column)


@lru_cache(maxsize=64)
def _split(template: str, columns: frozenset[str] | None) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    end = 0
    for match in (_IDENTIFIERS if columns is None else _BRACES).finditer(template):
        escaped, name = match.groups()
        piece: Piece = (match.group(), False)
        if escaped is not None and (columns is None or escaped in columns or _NAME.fullmatch(escaped)):
            piece = (f"{{{escaped}}}", False)
        elif name is not None and (columns is None or name in columns):
            piece = (name, True)
        pieces += [(template[end : match.start()], False), piece]
        end = match.end()
    pieces.append((template[end:], False))
    runs = groupby(pieces, key=lambda one: one if one[1] else None)
    return tuple(column or ("".join(text for text, _ in texts), False) for column, texts in runs)


def split_template(template: str, columns: Collection[str] | None = None) -> tuple[Piece, ...]:
    """A template as texts and names of columns, in its order."""
    optional = find_optional(template, columns)
    if optional:
        template = _opened(template, optional, lambda name: True)
    return _split(template, None if columns is None else frozenset(columns))


def to_text(value: object, column: str) -> str:
    """A cell as text, numbers as JSON writes them; a list, an object or an infinite number is not text.

    None is empty, and so is NaN, which tables of numbers write where a value is missing.
    """
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return ""
    if isinstance(value, float) and math.isinf(value):
        raise TypeError(f"column `{column}` holds {value}, and a text or number is needed")
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise TypeError(f"column `{column}` holds a {type(value).__name__}, and a text or number is needed")
