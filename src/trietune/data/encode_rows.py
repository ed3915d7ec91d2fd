"""Rows of one split become an entry of the cache, block by block, with everything counted on the way.

Rows that cannot be read, and labels that are wrong, stop it: at the end of the file, so that all of them are counted.
Examples that are overlong or empty are left out of training data, as the settings say; validation keeps everything.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np

from trietune.data.cache import CacheWriter
from trietune.data.chat import Segment
from trietune.data.columns import (
    FORMS,
    REQUIRED_COLUMNS,
    RowFormat,
    RowFormatKind,
    Unlabeled,
    WrongRow,
    example_maker,
    find_form,
)
from trietune.data.counts import SAMPLES_KEPT, Count, SplitCounts
from trietune.data.encoder import EncodedExamples, Encoder
from trietune.data.examples import IGNORED_LABEL, Example
from trietune.data.files import BrokenRow, Row
from trietune.data.sources import PlacedRow
from trietune.data.templates import find_columns, find_half_character, to_text
from trietune.data.weights import Weighting, row_weight, weigh
from trietune.errors import UserError

_T = TypeVar("_T")

Overlong = Literal["drop", "truncate_prompt", "error"]
ROWS_PER_BLOCK = 4096
# Completions are tallied until there are more different ones than any set of labels has.
COMPLETIONS_TALLIED = 20


@dataclass(frozen=True, slots=True)
class LengthRules:
    """What to do with examples.

    Attributes:
        overlong: None keeps them, as validation does.
        keeps_empty: whether an example without a completion stays.
        ignored_label: of data that brings its own labels, the one that counts for nothing.
    """

    max_length: int
    overlong: Overlong | None
    keeps_empty: bool
    ignored_label: int = IGNORED_LABEL


def tokenize_rows(
    placed: Iterator[PlacedRow],
    writer: CacheWriter,
    *,
    source: str,
    row_format: RowFormat,
    encoder: Encoder,
    rules: LengthRules,
    check_stop: Callable[[], None],
    progress: Callable[[int], None],
    left_out: np.ndarray | None = None,
    weighting: Weighting | None = None,
) -> SplitCounts:
    """Write the examples of these rows and count them.

    Args:
        weighting: where the rows have weights; None if nowhere.
        left_out: rows that belong to another split, bool [rows or more]; they are checked, and not written.

    Raises:
        UserError: rows are broken or labels wrong; all of them are counted, the first ten are named.
    """
    tally = _Tally(source=source)
    to_example = _example_reader(row_format, encoder, rules)
    if weighting is not None and weighting.has_column:
        to_example = _with_row_weights(to_example)
    while block := list(islice(placed, ROWS_PER_BLOCK)):
        check_stop()
        read = _read_block(block, to_example, left_out, tally)
        # After a first broken row nothing will be written: the rest is only read to be counted.
        if not tally.problems.number:
            _write_block(read, writer, row_format, encoder, rules, tally, is_weighted=weighting is not None)
        progress(tally.read)
    tally.problems.raise_any(source, tally.seen)
    tally.too_long.raise_any(source, tally.seen)
    return tally.finish(writer)


@dataclass(slots=True)
class Problems:
    """Rows that stop the run, in the order that they were met."""

    verdict: str
    next_step: str

    number: int = 0
    num_unlabeled: int = 0
    samples: list[str] = field(default_factory=list)

    def add(self, place: str, reason: str, *, is_unlabeled: bool = False) -> None:
        self.number += 1
        self.num_unlabeled += is_unlabeled
        if len(self.samples) < SAMPLES_KEPT:
            self.samples.append(f"{place}: {reason}")

    def raise_any(self, source: str, num_rows: int) -> None:
        """Raise what was collected as one error; nothing if there is nothing."""
        if not self.number:
            return
        more = self.number - len(self.samples)
        is_test_split = self.num_unlabeled == self.number
        raise UserError(
            f"{self.number:,} of {num_rows:,} rows of `{source}` {'have no label' if is_test_split else self.verdict}",
            where="\n       ".join([*self.samples, *([f"and {more:,} more"] if more else [])]),
            next_step="test splits are published without labels: take `validation` (dev.tsv)"
            if is_test_split
            else self.next_step,
        )


@dataclass(frozen=True, slots=True)
class _Read:
    """One example, what it is to be tokenized from, and whether a text in its prompt is empty."""

    place: str
    example: Example
    segments: list[Segment]
    tokens: tuple[list[int], list[int]] | None
    has_empty_text: bool
    is_padded: bool = False
    weight: float = 1.0


@dataclass(slots=True)
class _Tally:
    """Counts that grow with the blocks. Examples are remembered by an 8-byte hash each, never by their text."""

    source: str
    seen: int = 0
    read: int = 0
    num_examples: int = 0
    counts: SplitCounts = field(default_factory=lambda: SplitCounts(source=""))
    problems: Problems = field(
        default_factory=lambda: Problems("cannot be used", "correct or remove them; nothing is skipped in silence")
    )
    too_long: Problems = field(
        default_factory=lambda: Problems(
            "are too long, and `overlong: error` is set", "raise `max_length`, or write `overlong: truncate_prompt`"
        )
    )
    hashes: array[int] = field(default_factory=lambda: array("q"))
    completions: Counter[str] | None = field(default_factory=Counter)
    own_ids: set[str] = field(default_factory=set)

    def add(self, examples: Sequence[Example], encoded: EncodedExamples) -> None:
        self.hashes.extend(hash((one.prompt, one.completion, one.messages)) for one in examples)
        if self.completions is not None:
            self.completions.update(one.completion for one in examples)
            if len(self.completions) > COMPLETIONS_TALLIED:
                self.completions = None
        counts = self.counts
        self.counts = replace(
            counts,
            kept=counts.kept + len(examples),
            num_tokens=counts.num_tokens + len(encoded.input_ids),
            num_labels=counts.num_labels + int(np.count_nonzero(encoded.labels != IGNORED_LABEL)),
            longest=max(counts.longest, int(encoded.lengths.max(initial=0))),
        )

    def count(self, name: str, places: Sequence[str]) -> None:
        counter: Count = getattr(self.counts, name)
        changed: dict[str, Any] = {name: counter.plus(places)}
        self.counts = replace(self.counts, **changed)

    def finish(self, writer: CacheWriter) -> SplitCounts:
        hashes = np.frombuffer(self.hashes, np.int64) if self.hashes else np.zeros(0, np.int64)
        _, first = np.unique(hashes, return_index=True)
        is_duplicate = np.ones(len(hashes), bool)
        is_duplicate[first] = False
        ids = writer.view().ids
        samples = tuple(ids[index] for index in np.flatnonzero(is_duplicate)[:SAMPLES_KEPT].tolist())
        return replace(
            self.counts,
            source=self.source,
            read=self.read,
            num_examples=self.num_examples,
            duplicates=Count(len(hashes) - len(first), samples),
            completions=dict(self.completions or {}),
        )


def _example_reader(row_format: RowFormat, encoder: Encoder, rules: LengthRules) -> Callable[[Row, str], list[_Read]]:
    """The function from a row and its place to what is written of it; it raises `WrongRow`."""
    if row_format.kind == "tokens":

        def read_tokens(row: Row, place: str) -> list[_Read]:
            _check_form(row, row_format)
            return [_read_tokens(row, place, encoder, rules)]

        return read_tokens
    make = example_maker(row_format)
    prompt_columns = find_columns(row_format.prompt_template, row_format.template_columns)

    def read(row: Row, place: str) -> list[_Read]:
        _check_form(row, row_format)
        example = make(row, place)
        if encoder.prompt_format.is_turn_by_turn:
            turns = _turns(example)
            return [_Read(place, turn, _segments(turn, encoder), None, has_empty_text=False) for turn in turns]
        is_empty = any(not to_text(row.get(name), name).strip() for name in prompt_columns)
        if row_format.kind == "columns":
            is_empty = not example.prompt.strip()
        return [_Read(place, example, _segments(example, encoder), None, is_empty)]

    return read


def _check_form(row: Row, row_format: RowFormat) -> None:
    """The first row decides how all are read; one that would be read in another way may not pass in silence."""
    if row_format.kind not in FORMS:
        return
    own = find_form(row)
    if own is not None and FORMS.index(own) < FORMS.index(row_format.kind):
        raise WrongRow(
            f"it has {_in_words(own)}, and the first row of the data {_in_words(row_format.kind)}: "
            "put rows of one form into one file"
        )


def _in_words(kind: RowFormatKind) -> str:
    return ", ".join(f"`{name}`" for name in REQUIRED_COLUMNS[kind])


def _segments(example: Example, encoder: Encoder) -> list[Segment]:
    segments = encoder.segments(example)
    if half := find_half_character(example.id, *example.answers, *(text for text, _ in segments)):
        raise WrongRow(f"the text holds half a character, or a byte that is not UTF-8 ({half})")
    return segments


def _with_row_weights(to_example: Callable[[Row, str], list[_Read]]) -> Callable[[Row, str], list[_Read]]:
    def read(row: Row, place: str) -> list[_Read]:
        weight = row_weight(row)
        return [replace(one, weight=weight) for one in to_example(row, place)]

    return read


def _turns(example: Example) -> list[Example]:
    """Each answer of a conversation as an example that ends with it."""
    messages = example.messages
    ends = [index + 1 for index, message in enumerate(messages) if message.role == "assistant"]
    return [
        replace(
            example, id=f"{example.id} turn {number}", messages=messages[:end], completion=messages[end - 1].content
        )
        for number, end in enumerate(ends, start=1)
    ]


def _read_tokens(row: Row, place: str, encoder: Encoder, rules: LengthRules) -> _Read:
    """Data that somebody else tokenized: kept as it is, checked, and decoded to have a text to show."""
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
    return _Read(place, example, [], (input_ids, labels), has_empty_text=False, is_padded=num_masked > 0)


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


def _read_block(
    block: Sequence[PlacedRow],
    to_example: Callable[[Row, str], list[_Read]],
    left_out: np.ndarray | None,
    tally: _Tally,
) -> list[_Read]:
    skipped = [False] * len(block)
    if left_out is not None:
        skipped = left_out[tally.seen : tally.seen + len(block)].tolist()
    tally.seen += len(block)
    tally.read += len(block) - sum(skipped)
    read: list[_Read] = []
    for (place, row), is_skipped in zip(block, skipped, strict=True):
        if isinstance(row, BrokenRow):
            tally.problems.add(place, row.reason)
            continue
        try:
            made = to_example(row, place)
        except WrongRow as error:
            tally.problems.add(place, str(error), is_unlabeled=isinstance(error, Unlabeled))
            continue
        if is_skipped:
            continue
        read += made
    tally.num_examples += len(read)
    return [_with_unique_id(one, tally.own_ids) for one in read]


def _with_unique_id(one: _Read, own_ids: set[str]) -> _Read:
    """Ids that the data brings may repeat, for instance over two files; what begins with its place never does."""
    if one.example.id.startswith(one.place):
        return one
    if one.example.id in own_ids:
        return replace(one, example=replace(one.example, id=one.place))
    own_ids.add(one.example.id)
    return one


def _write_block(
    read: Sequence[_Read],
    writer: CacheWriter,
    row_format: RowFormat,
    encoder: Encoder,
    rules: LengthRules,
    tally: _Tally,
    *,
    is_weighted: bool,
) -> None:
    tally.count("without_prompt", [one.place for one in read if one.has_empty_text])
    if row_format.kind != "tokens":
        empty = [one for one in read if not one.example.completion.strip()]
        tally.count("without_completion", [one.place for one in empty])
        if empty and not rules.keeps_empty:
            read = [one for one in read if one.example.completion.strip()]
        encoded = encoder.encode_segments([one.segments for one in read])
    else:
        encoded = _encode_tokens([one.tokens for one in read if one.tokens is not None])
        tally.count("padded", [one.place for one in read if one.is_padded])
    has_labels = _find_labeled(encoded)
    if not has_labels.all():
        tally.count("without_labels", _chosen([one.place for one in read], ~has_labels))
        encoded, read = _take(encoded, has_labels), _chosen(read, has_labels)
    if is_weighted:
        try:
            encoded, read = _weighted(encoded, read, rules, encoder, tally)
        except WrongRow as error:
            tally.problems.add(read[0].place, str(error))
            return
    encoded, read = _fit(encoded, read, rules, encoder, tally)
    examples = [one.example for one in read]
    tally.add(examples, encoded)
    writer.append(encoded, examples)


def _weighted(
    encoded: EncodedExamples, read: Sequence[_Read], rules: LengthRules, encoder: Encoder, tally: _Tally
) -> tuple[EncodedExamples, Sequence[_Read]]:
    """With the weights of rows and messages; what has only labels of weight 0 is left out of training data."""
    examples = [one.example for one in read]
    only_last = encoder.prompt_format.is_turn_by_turn
    had_labels = _have_labels(encoded)
    encoded = weigh(encoded, examples, [one.weight for one in read], only_last=only_last)
    is_empty = had_labels & ~_have_labels(encoded)
    tally.count("without_weight", [one.place for one, empty in zip(read, is_empty.tolist(), strict=True) if empty])
    if rules.keeps_empty or not is_empty.any():
        return encoded, read
    return _take(encoded, ~is_empty), _chosen(read, ~is_empty)


def _have_labels(encoded: EncodedExamples) -> np.ndarray:
    counts = np.concatenate(([0], np.cumsum(encoded.labels != IGNORED_LABEL)))
    ends = np.cumsum(encoded.lengths)
    found: np.ndarray = counts[ends] > counts[ends - encoded.lengths]
    return found


def _encode_tokens(tokens: Sequence[tuple[list[int], list[int]]]) -> EncodedExamples:
    lengths = np.array([len(ids) for ids, _ in tokens], np.int64)
    input_ids = np.array([one for ids, _ in tokens for one in ids], np.int32)
    labels = np.array([one for _, own in tokens for one in own], np.int32)
    labels[(np.cumsum(lengths) - lengths)[lengths > 0]] = IGNORED_LABEL
    return EncodedExamples(input_ids, labels, lengths)


def _find_labeled(encoded: EncodedExamples) -> np.ndarray:
    """Which sequences have a label; bool [examples]."""
    of_token = np.repeat(np.arange(len(encoded.lengths)), encoded.lengths)
    labeled = of_token[encoded.labels != IGNORED_LABEL]
    return np.bincount(labeled, minlength=len(encoded.lengths)) > 0


def _fit(
    encoded: EncodedExamples, read: Sequence[_Read], rules: LengthRules, encoder: Encoder, tally: _Tally
) -> tuple[EncodedExamples, Sequence[_Read]]:
    """Apply `max_length`: leave out, cut or refuse what is longer."""
    is_long = encoded.lengths > rules.max_length
    if not is_long.any():
        return encoded, read
    places = [one.place for one in read]
    if rules.overlong == "error":
        lengths = encoded.lengths[is_long].tolist()
        for place, length in zip(_chosen(places, is_long), lengths, strict=True):
            tally.too_long.add(place, f"{length} tokens, and `max_length` is {rules.max_length}")
        return _take(encoded, ~is_long), _chosen(read, ~is_long)
    if rules.overlong == "truncate_prompt":
        encoded, is_cut = _cut_prompts(encoded, rules.max_length, has_bos=encoder.prompt_format.bos_id is not None)
        tally.count("truncated", _chosen(places, is_cut))
        is_long &= ~is_cut
    tally.count("overlong", _chosen(places, is_long))
    if rules.overlong is None:
        return encoded, read
    return _take(encoded, ~is_long), _chosen(read, ~is_long)


def _cut_prompts(encoded: EncodedExamples, max_length: int, *, has_bos: bool) -> tuple[EncodedExamples, np.ndarray]:
    """Take tokens away behind BOS, never a label; what is too long by its labels alone stays as it is.

    Returns:
        The sequences, and which of them were cut; bool [examples].
    """
    ends = np.cumsum(encoded.lengths)
    starts = ends - encoded.lengths
    keep = np.ones(len(encoded.input_ids), bool)
    is_cut = np.zeros(len(encoded.lengths), bool)
    for index in np.flatnonzero(encoded.lengths > max_length).tolist():
        start, end = int(starts[index]), int(ends[index])
        first = start + int(has_bos)
        surplus = end - start - max_length
        labeled = np.flatnonzero(encoded.labels[start:end] != IGNORED_LABEL)
        # One token of the prompt stays: without any, the first label would have nothing to be predicted from.
        if len(labeled) and first + surplus < start + labeled[0] + int(has_bos):
            keep[first : first + surplus] = False
            is_cut[index] = True
    lengths = encoded.lengths - np.where(is_cut, encoded.lengths - max_length, 0)
    weights = None if encoded.weights is None else encoded.weights[keep]
    return EncodedExamples(encoded.input_ids[keep], encoded.labels[keep], lengths, weights), is_cut


def _take(encoded: EncodedExamples, mask: np.ndarray) -> EncodedExamples:
    of_token = np.repeat(mask, encoded.lengths)
    weights = None if encoded.weights is None else encoded.weights[of_token]
    return EncodedExamples(encoded.input_ids[of_token], encoded.labels[of_token], encoded.lengths[mask], weights)


def _chosen(values: Sequence[_T], mask: np.ndarray) -> list[_T]:
    return [values[index] for index in np.flatnonzero(mask).tolist()]
