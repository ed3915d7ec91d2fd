"""One row becomes what is written of it: an example, or one for each answer of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trietune.chat.conversation import Segment
from trietune.data.chat import is_answer
from trietune.data.columns import (
    FORMS,
    REQUIRED_COLUMNS,
    RowFormat,
    WrongRow,
    example_maker,
    find_form,
    quoted,
)
from trietune.data.encoder import Encoder
from trietune.data.examples import IGNORED_LABEL, Example
from trietune.data.known_forms import KNOWN_FORMS
from trietune.data.opening import Row
from trietune.data.taken import check_answers
from trietune.data.templates import find_columns, find_optional, to_text
from trietune.data.weights import COLUMN, row_weight
from trietune.io.half_characters import find_half_character

Overlong = Literal["drop", "truncate_prompt", "error"]


@dataclass(frozen=True, slots=True)
class LengthRules:
    """What to do with examples.

    Attributes:
        overlong: None keeps them, as validation does.
        keeps_empty: whether an example without a completion stays.
        ignored_label: in data that brings its own labels, the one that counts for nothing.
    """

    max_length: int
    overlong: Overlong | None
    keeps_empty: bool
    ignored_label: int = IGNORED_LABEL


@dataclass(frozen=True, slots=True)
class ReadExample:
    """One example, what it is to be tokenized from, and whether a text in its prompt is empty."""

    place: str
    example: Example
    segments: list[Segment]
    tokens: tuple[list[int], list[int]] | None
    has_empty_text: bool
    is_padded: bool = False
    weight: float = 1.0
    said: Sequence[Segment] = ()
    num_unlearnt: int = 0

    @property
    def is_unlearnt(self) -> bool:
        """Whether a conversation says that none of its answers is learned."""
        return self.num_unlearnt > 0 and not any(is_learnt for _, is_learnt in self.segments)


def example_reader(
    row_format: RowFormat, encoder: Encoder, rules: LengthRules
) -> Callable[[Row, str], list[ReadExample]]:
    """The function from a row and its place to what is written of it; it raises `WrongRow`."""
    if row_format.kind == "tokens":

        def read_tokens(row: Row, place: str) -> list[ReadExample]:
            _check_form(row, row_format)
            return [_read_tokens(row, place, encoder, rules)]

        return read_tokens
    make = example_maker(row_format)
    optional = find_optional(row_format.prompt_template, row_format.template_columns)
    prompt_columns = [
        name for name in find_columns(row_format.prompt_template, row_format.template_columns) if name not in optional
    ]

    def read(row: Row, place: str) -> list[ReadExample]:
        _check_form(row, row_format)
        example = make(row, place)
        if example.messages:
            turns = _turns(example) if encoder.prompt_format.is_turn_by_turn else [example]
            return [_read_conversation(turn, place, encoder) for turn in turns]
        is_empty = any(not to_text(row.get(name), name).strip() for name in prompt_columns)
        if row_format.kind == "columns":
            is_empty = not example.prompt.strip()
        return [ReadExample(place, example, _segments(example, encoder), None, is_empty)]

    return read


def _check_form(row: Row, row_format: RowFormat) -> None:
    """The first row decides how all are read; one that would be read in another way may not pass in silence."""
    if row_format.kind == "columns" and isinstance(row.get("label"), bool):
        raise WrongRow(
            "`label` says whether its completion is wanted, and `objective: sft` would learn it either way: "
            "`objective: kto` learns from both"
        )
    known = _known_columns(row_format)
    if (row_format.kind not in FORMS and not known) or row_format.message_columns != ("messages",):
        return
    own = find_form(row)
    if own is not None and (known or FORMS.index(own) < FORMS.index(row_format.kind)):
        raise WrongRow(
            f"it has {quoted(REQUIRED_COLUMNS[own])}, and the first row of the data "
            f"{quoted(known or REQUIRED_COLUMNS[row_format.kind])}: put rows of one form into one file"
        )


def _known_columns(row_format: RowFormat) -> tuple[str, ...]:
    """The columns by which data was recognized that is read by the templates of a known form; empty for other data."""
    templates = (row_format.prompt_template, row_format.completion_template)
    forms = (one for one in KNOWN_FORMS if (one.prompt_template, one.completion_template) == templates)
    return next((one.required for one in forms), ())


def _read_conversation(example: Example, place: str, encoder: Encoder) -> ReadExample:
    said = encoder.said(example)
    _check_characters(example, said)
    check_answers(example, said, encoder)
    answers = [message for message in example.messages if message.role == "assistant"]
    if encoder.prompt_format.is_turn_by_turn:
        answers = answers[-1:]
    num_unlearnt = sum(message.weight == 0 for message in answers)
    segments = encoder.learnt(example, said)
    return ReadExample(place, example, segments, None, has_empty_text=False, said=said, num_unlearnt=num_unlearnt)


def _segments(example: Example, encoder: Encoder) -> list[Segment]:
    segments = encoder.segments(example)
    _check_characters(example, segments)
    return segments


def _check_characters(example: Example, segments: Sequence[Segment]) -> None:
    if half := find_half_character(example.id, *example.answers, *(text for text, _ in segments)):
        raise WrongRow(f"the text holds half a character, or a byte that is not UTF-8 ({half})")


def with_row_weights(to_example: Callable[[Row, str], list[ReadExample]]) -> Callable[[Row, str], list[ReadExample]]:
    def read(row: Row, place: str) -> list[ReadExample]:
        weight = row_weight(row)
        return [replace(one, weight=weight) for one in to_example(row, place)]

    return read


def without_row_weights(to_example: Callable[[Row, str], list[ReadExample]]) -> Callable[[Row, str], list[ReadExample]]:
    """For data whose first row has no weight: another row's would be dropped."""

    def read(row: Row, place: str) -> list[ReadExample]:
        if row.get(COLUMN) is not None:
            raise WrongRow(f"it has a `{COLUMN}`, and the first row of the data has none: give every row one, or none")
        return to_example(row, place)

    return read


def _turns(example: Example) -> list[Example]:
    """Each answer of a conversation as an example that ends with it."""
    messages = example.messages
    ends = [index + 1 for index, message in enumerate(messages) if is_answer(message, index)]
    return [
        replace(
            example,
            id=f"{example.id} turn {number}",
            messages=messages[:end],
            completion=messages[end - 1].content or messages[end - 1].more,
        )
        for number, end in enumerate(ends, start=1)
    ]


def _read_tokens(row: Row, place: str, encoder: Encoder, rules: LengthRules) -> ReadExample:
    """Data tokenized elsewhere: kept as it is, checked, and decoded to have a text to show."""
    input_ids, labels, mask = (_read_numbers(row, name) for name in ("input_ids", "labels", "attention_mask"))
    if len(input_ids) != len(labels):
        raise WrongRow(f"{len(input_ids)} `input_ids` and {len(labels)} `labels`")
    kept = _find_kept(mask, len(input_ids)) if row.get("attention_mask") is not None else slice(None)
    num_masked = len(input_ids) - len(input_ids[kept])
    input_ids, labels = input_ids[kept], labels[kept]
    size = encoder.beginning.get_vocab_size(with_added_tokens=True)
    wrong = next((one for one in input_ids if not 0 <= one < size), None)
    wrong = next((one for one in labels if one != rules.ignored_label and not 0 <= one < size), wrong)
    if wrong is not None:
        raise WrongRow(f"token {wrong} is outside the vocabulary of {size:,}")
    labels = [IGNORED_LABEL if one == rules.ignored_label else one for one in labels]
    first = next((index for index, one in enumerate(labels) if one != IGNORED_LABEL), len(labels))
    example = Example(
        id=place,
        prompt=str(encoder.beginning.decode(input_ids[:first], skip_special_tokens=False)),
        completion=str(encoder.beginning.decode(input_ids[first:], skip_special_tokens=False)),
    )
    return ReadExample(place, example, [], (input_ids, labels), has_empty_text=False, is_padded=num_masked > 0)


def _read_numbers(row: Row, name: str) -> list[int]:
    value = row.get(name)
    if value is None:
        return []
    if not isinstance(value, list | tuple) or not all(type(one) in (int, bool) for one in value):
        raise WrongRow(f"`{name}` must be a list of whole numbers")
    if name != "attention_mask" and any(isinstance(one, bool) for one in value):
        raise WrongRow(f"`{name}` must be a list of whole numbers")
    return [int(one) for one in value]


def _find_kept(mask: list[int], num_tokens: int) -> slice:
    """What a mask leaves of a row: everything between padding at its left and padding at its right."""
    if len(mask) != num_tokens:
        raise WrongRow(f"{num_tokens} `input_ids` and {len(mask)} values of `attention_mask`")
    if not set(mask) <= {0, 1}:
        raise WrongRow("`attention_mask` must hold 0 and 1")
    if 1 not in mask:
        return slice(0, 0)
    first, last = mask.index(1), num_tokens - mask[::-1].index(1)
    if 0 in mask[first:last]:
        raise WrongRow("`attention_mask` hides tokens between others, which is not supported")
    return slice(first, last)
