"""Rows of answers become an entry of the cache, block by block; a row is kept or left out as a whole.

Its answers share their prompt token for token, so `max_length` is kept by the longest of them: the row is left out, or
the prompt is shortened by the same tokens in all. Answers that equal another one of their row say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from trietune.chat.conversation import Segment
from trietune.data.answers import flat_ranges
from trietune.data.cache import CacheWriter
from trietune.data.columns import RowFormat, WrongRow
from trietune.data.counts import Count, SplitCounts
from trietune.data.encode_rows import ROWS_PER_BLOCK
from trietune.data.encoder import EncodedExamples, Encoder
from trietune.data.examples import IGNORED_LABEL
from trietune.data.late_columns import LateColumns
from trietune.data.least_tokens import LeastTokens
from trietune.data.opening import BrokenRow
from trietune.data.preferences import AnswerForm, AnswerRow, answer_reader
from trietune.data.read_row import LengthRules
from trietune.data.rows import PlacedRow
from trietune.data.tally import Problems
from trietune.io.half_characters import find_half_character


def tokenize_answers(
    placed: Iterator[PlacedRow],
    writer: CacheWriter,
    *,
    source: str,
    form: AnswerForm,
    encoder: Encoder,
    rules: LengthRules,
    check_stop: Callable[[], None],
    progress: Callable[[int], None],
    row_format: RowFormat,
    left_out: np.ndarray | None = None,
    first_columns: Collection[str] = (),
) -> SplitCounts:
    """Write the answers of these rows and count the rows.

    Args:
        left_out: rows that belong to another split, bool [rows or more]; they are checked, and not written.
        first_columns: those of the first row, which the user has heard of; empty says nothing of columns.

    Raises:
        UserError: rows are broken, or too long where that is an error; all are counted, the first ten are named.
    """
    tally = _Tally(SplitCounts(source=source))
    read = answer_reader(form)
    least = LeastTokens(encoder)
    late = LateColumns(row_format, set(first_columns))
    while block := list(islice(placed, ROWS_PER_BLOCK)):
        check_stop()
        rows = _read_block(block, read, left_out, tally)
        if first_columns:
            late.add(block)
        if not tally.problems.number:
            _write_block(rows, writer, encoder, rules, least, tally)
        progress(tally.counts.read)
    tally.problems.raise_any(source, tally.seen)
    tally.too_long.raise_any(source, tally.seen)
    return replace(tally.counts, late_columns=late.unused)


@dataclass(slots=True)
class _Tally:
    counts: SplitCounts
    seen: int = 0
    problems: Problems = field(
        default_factory=lambda: Problems("cannot be used", "correct or remove them; nothing is skipped silently")
    )
    too_long: Problems = field(
        default_factory=lambda: Problems(
            "are too long, and `overlong: error` is set", "raise `max_length`, or write `overlong: truncate_prompt`"
        )
    )

    def count(self, name: str, places: Sequence[str]) -> None:
        counter: Count = getattr(self.counts, name)
        self.counts = replace(self.counts, **{name: counter.plus(places)})  # type: ignore[arg-type]


def _read_block(
    block: Sequence[PlacedRow],
    read: Callable[..., list[AnswerRow]],
    left_out: np.ndarray | None,
    tally: _Tally,
) -> list[AnswerRow]:
    skipped = [False] * len(block) if left_out is None else left_out[tally.seen : tally.seen + len(block)].tolist()
    tally.seen += len(block)
    rows: list[AnswerRow] = []
    for (place, row), is_skipped in zip(block, skipped, strict=True):
        if isinstance(row, BrokenRow):
            tally.problems.add(place, row.reason)
            continue
        try:
            made = read(row, place)
            _check_characters(made)
        except WrongRow as error:
            tally.problems.add(place, str(error))
            continue
        rows += [] if is_skipped else made
    num_read = len(block) - sum(skipped)
    tally.counts = replace(
        tally.counts, read=tally.counts.read + num_read, num_examples=tally.counts.num_examples + len(rows)
    )
    return rows


def _check_characters(rows: Sequence[AnswerRow]) -> None:
    for row in rows:
        for example in row.examples:
            messages = (text for message in example.messages for text in (message.role, message.content))
            if half := find_half_character(example.id, example.prompt, example.completion, *messages):
                raise WrongRow(f"the text holds half a character, or a byte that is not UTF-8 ({half})")


def _write_block(
    rows: Sequence[AnswerRow],
    writer: CacheWriter,
    encoder: Encoder,
    rules: LengthRules,
    least: LeastTokens,
    tally: _Tally,
) -> None:
    kept = [told for row in rows if (told := _without_repeats(row, tally)) is not None]
    examples = [example for row in kept for example in row.examples]
    try:
        segments = [encoder.segments(example) for example in examples]
    except WrongRow:
        _note_refused(kept, encoder, tally)
        return
    kept, segments = _without_the_longest(kept, segments, rules, least, tally)
    encoded = encoder.encode_segments(segments)
    sizes = np.array([len(row.examples) for row in kept], np.int64)
    encoded, stays = _fit(encoded, sizes, [row.examples[0].id for row in kept], rules, encoder, tally)
    kept = [row for row, is_kept in zip(kept, stays.tolist(), strict=True) if is_kept]
    writer.append(encoded, [example for row in kept for example in row.examples])
    writer.append_rows(sizes[stays], np.array([grade for row in kept for grade in row.grades], np.float64))
    counts = tally.counts
    tally.counts = replace(
        counts,
        kept=counts.kept + len(kept),
        num_tokens=counts.num_tokens + len(encoded.input_ids),
        num_labels=counts.num_labels + int(np.count_nonzero(encoded.labels != IGNORED_LABEL)),
        longest=max(counts.longest, int(encoded.lengths.max(initial=0))),
    )


def _without_the_longest(
    rows: Sequence[AnswerRow],
    segments: Sequence[list[Segment]],
    rules: LengthRules,
    least: LeastTokens,
    tally: _Tally,
) -> tuple[list[AnswerRow], list[list[Segment]]]:
    """Apply `max_length` to rows with an answer that is longer by its text: tokenizing it could take all memory."""
    kept: list[AnswerRow] = []
    their_segments: list[list[Segment]] = []
    rest = iter(segments)
    for row in rows:
        own = [next(rest) for _ in row.examples]
        longest = max(least.of(one, rules) for one in own)
        place = row.examples[0].id
        if longest <= rules.max_length:
            kept.append(row)
            their_segments += own
        elif rules.overlong == "error":
            tally.too_long.add(place, f"at least {longest} tokens, and `max_length` is {rules.max_length}")
        else:
            tally.count("overlong", [place])
    return kept, their_segments


def _without_repeats(row: AnswerRow, tally: _Tally) -> AnswerRow | None:
    """The row's distinct answers; None if there are not two of different grades in a row that compares."""
    if len(row.examples) == 1 and row.grades[0] in (1.0, -1.0):
        return row  # a verdict on one answer compares nothing
    first_with: dict[str, int] = {}
    for number, example in enumerate(row.examples):
        first_with.setdefault(example.completion, number)
    numbers = sorted(first_with.values())
    place = row.examples[0].id
    tally.count("equal_answers", [place] * (len(row.examples) - len(numbers)))
    if len({row.grades[number] for number in numbers}) < 2:
        tally.count("without_pair", [place])
        return None
    return AnswerRow(tuple(row.examples[n] for n in numbers), tuple(row.grades[n] for n in numbers))


def _note_refused(rows: Sequence[AnswerRow], encoder: Encoder, tally: _Tally) -> None:
    """Find the conversations that the chat template refuses."""
    for row in rows:
        try:
            for example in row.examples:
                encoder.segments(example)
        except WrongRow as error:
            tally.problems.add(row.examples[0].id, str(error))


def _fit(
    encoded: EncodedExamples,
    sizes: np.ndarray,
    places: Sequence[str],
    rules: LengthRules,
    encoder: Encoder,
    tally: _Tally,
) -> tuple[EncodedExamples, np.ndarray]:
    """Apply `max_length`; returns the answers that stay, and which rows do: bool [rows]."""
    starts = np.cumsum(sizes) - sizes
    longest = np.maximum.reduceat(encoded.lengths, starts) if len(sizes) else np.zeros(0, np.int64)
    is_long = longest > rules.max_length
    stays = np.ones(len(sizes), bool)
    if not is_long.any():
        return encoded, stays
    named = [places[row] for row in np.flatnonzero(is_long).tolist()]
    if rules.overlong == "error":
        for place, length in zip(named, longest[is_long].tolist(), strict=True):
            tally.too_long.add(place, f"{length} tokens, and `max_length` is {rules.max_length}")
        return _take(encoded, np.repeat(~is_long, sizes)), ~is_long
    if rules.overlong == "truncate_prompt":
        surplus = np.where(is_long, longest - rules.max_length, 0)
        encoded, is_cut = _cut_prompts(encoded, sizes, surplus, has_bos=encoder.prompt_format.bos_id is not None)
        tally.count("truncated", [places[row] for row in np.flatnonzero(is_cut).tolist()])
        is_long &= ~is_cut
    tally.count("overlong", [places[row] for row in np.flatnonzero(is_long).tolist()])
    if rules.overlong is None:
        return encoded, stays
    return _take(encoded, np.repeat(~is_long, sizes)), ~is_long


def _cut_prompts(
    encoded: EncodedExamples, sizes: np.ndarray, surplus: np.ndarray, *, has_bos: bool
) -> tuple[EncodedExamples, np.ndarray]:
    """Take `surplus` tokens behind BOS from every answer of a row, if its prompt has more than those.

    Returns:
        The sequences, and which rows were cut; bool [rows].
    """
    ends = np.cumsum(encoded.lengths)
    begins = ends - encoded.lengths
    cut = np.zeros(len(encoded.lengths), np.int64)
    is_cut = np.zeros(len(sizes), bool)
    firsts = np.cumsum(sizes) - sizes
    for row in np.flatnonzero(surplus).tolist():
        answers = range(int(firsts[row]), int(firsts[row] + sizes[row]))
        first = answers[0]
        labeled = np.flatnonzero(encoded.labels[begins[first] : ends[first]] != IGNORED_LABEL)
        if len(labeled) and surplus[row] + int(has_bos) < labeled[0]:
            cut[answers.start : answers.stop] = surplus[row]
            is_cut[row] = True
    keep = np.ones(len(encoded.input_ids), bool)
    keep[flat_ranges(begins + int(has_bos), begins + int(has_bos) + cut)] = False
    return EncodedExamples(encoded.input_ids[keep], encoded.labels[keep], encoded.lengths - cut), is_cut


def _take(encoded: EncodedExamples, mask: np.ndarray) -> EncodedExamples:
    of_token = np.repeat(mask, encoded.lengths)
    return EncodedExamples(encoded.input_ids[of_token], encoded.labels[of_token], encoded.lengths[mask])
