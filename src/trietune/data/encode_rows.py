"""Rows of one split become an entry of the cache, block by block, with everything counted on the way.

Rows that cannot be read, and labels that are wrong, stop it: at the end of the file, so that all of them are counted.
Examples that are overlong or empty are left out of training data, as the settings say; validation keeps everything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from trietune.data.cache import CacheWriter
from trietune.data.columns import RowFormat, Unlabeled, WrongRow
from trietune.data.counts import SplitCounts
from trietune.data.encoder import Encoder
from trietune.data.late_columns import LateColumns
from trietune.data.least_tokens import LeastTokens
from trietune.data.left_out import chosen, encode_tokens, find_labeled, fit, take, weighted
from trietune.data.opening import BrokenRow, Row
from trietune.data.read_row import LengthRules, ReadExample, example_reader, with_row_weights, without_row_weights
from trietune.data.rows import PlacedRow
from trietune.data.taken import LeftByTemplate
from trietune.data.tally import Tally
from trietune.data.weights import Weighting

ROWS_PER_BLOCK = 4096
# What programs write into a table where a value is missing; pandas writes the first two.
MISSING_IN_WORDS = frozenset({"nan", "<na>", "nat", "none", "null", "n/a", "#n/a"})


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
    first_columns: Collection[str] = (),
    forbids_weights: bool = False,
) -> SplitCounts:
    """Write the examples of these rows and count them.

    Args:
        weighting: where the rows have weights; None if nowhere.
        left_out: rows that belong to another split, bool [rows or more]; they are checked, and not written.
        first_columns: those of the first row, which the user has heard of; empty says nothing of columns.
        forbids_weights: whether a row's `weight` is a mistake, because the first row has none.

    Raises:
        UserError: rows are broken or labels wrong; all of them are counted, the first ten are named.
    """
    tally = Tally(source=source)
    left = LeftByTemplate(encoder)
    least = LeastTokens(encoder)
    to_example = example_reader(row_format, encoder, rules)
    if weighting is not None and weighting.has_column:
        to_example = with_row_weights(to_example)
    elif forbids_weights:
        to_example = without_row_weights(to_example)
    late = LateColumns(row_format, set(first_columns))
    while block := list(islice(placed, ROWS_PER_BLOCK)):
        check_stop()
        read = _read_block(block, to_example, left_out, tally, left)
        if first_columns:
            late.add(block)
        # After a first broken row nothing will be written: the rest is only read to be counted.
        if not tally.problems.number:
            _write_block(read, writer, row_format, encoder, rules, least, tally, is_weighted=weighting is not None)
        progress(tally.read)
    tally.problems.raise_any(source, tally.seen)
    tally.too_long.raise_any(source, tally.seen)
    tally.take_over(left)
    tally.counts = replace(tally.counts, late_columns=late.unused)
    return tally.finish(writer)


def _read_block(
    block: Sequence[PlacedRow],
    to_example: Callable[[Row, str], list[ReadExample]],
    left_out: np.ndarray | None,
    tally: Tally,
    left: LeftByTemplate,
) -> list[ReadExample]:
    skipped = [False] * len(block)
    if left_out is not None:
        skipped = left_out[tally.seen : tally.seen + len(block)].tolist()
    tally.seen += len(block)
    tally.read += len(block) - sum(skipped)
    read: list[ReadExample] = []
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
        for one in made:
            if one.example.messages:
                left.add(place, one.example, one.said)
        read += made
    tally.num_examples += len(read)
    return [_with_unique_id(one, tally.own_ids) for one in read]


def _with_unique_id(one: ReadExample, own_ids: set[str]) -> ReadExample:
    """Ids that the data brings may repeat, for instance over two files; what begins with its place never does."""
    if one.example.id.startswith(one.place):
        return one
    if one.example.id in own_ids:
        return replace(one, example=replace(one.example, id=one.place))
    own_ids.add(one.example.id)
    return one


def _write_block(
    read: Sequence[ReadExample],
    writer: CacheWriter,
    row_format: RowFormat,
    encoder: Encoder,
    rules: LengthRules,
    least: LeastTokens,
    tally: Tally,
    *,
    is_weighted: bool,
) -> None:
    tally.count("without_prompt", [one.place for one in read if one.has_empty_text])
    if row_format.kind != "tokens":
        spelt = [one.place for one in read if one.example.completion.strip().lower() in MISSING_IN_WORDS]
        tally.count("missing_in_words", spelt)
        empty = [one for one in read if not one.example.completion.strip()]
        tally.count("without_completion", [one.place for one in empty])
        if empty and not rules.keeps_empty:
            read = [one for one in read if one.example.completion.strip()]
        tally.count("unlearnt", [one.place for one in read for _ in range(one.num_unlearnt) if not one.is_unlearnt])
        unlearnt = [one.place for one in read if one.is_unlearnt]
        if unlearnt:
            tally.count("without_weight", unlearnt)
            read = [one for one in read if not one.is_unlearnt]
        read = _without_the_longest(read, rules, least, tally, is_weighted=is_weighted)
        encoded = encoder.encode_segments([one.segments for one in read])
    else:
        encoded = encode_tokens([one.tokens for one in read if one.tokens is not None])
        tally.count("padded", [one.place for one in read if one.is_padded])
    has_labels = find_labeled(encoded)
    if not has_labels.all():
        tally.count("without_labels", chosen([one.place for one in read], ~has_labels))
        encoded, read = take(encoded, has_labels), chosen(read, has_labels)
    if is_weighted:
        try:
            encoded, read = weighted(encoded, read, rules, encoder, tally)
        except WrongRow as error:
            tally.problems.add(read[0].place, str(error))
            return
    encoded, read = fit(encoded, read, rules, encoder, tally)
    examples = [one.example for one in read]
    tally.add(examples, encoded)
    writer.append(encoded, examples)


def _without_the_longest(
    read: Sequence[ReadExample], rules: LengthRules, least: LeastTokens, tally: Tally, *, is_weighted: bool
) -> Sequence[ReadExample]:
    """Apply `max_length` to what is longer by its text: tokenizing it, to drop it, could take all memory."""
    if rules.overlong is None:
        return read
    kept = []
    for one in read:
        # Those that end with a label have one; weights are counted before lengths.
        is_plain = bool(one.segments) and one.segments[-1][1] and not (is_weighted and _has_weights(one))
        least_tokens = least.of(one.segments, rules) if is_plain else 0
        if least_tokens <= rules.max_length:
            kept.append(one)
        elif rules.overlong == "error":
            tally.too_long.add(one.place, f"at least {least_tokens} tokens, and `max_length` is {rules.max_length}")
        else:
            tally.count("overlong", [one.place])
    return kept


def _has_weights(one: ReadExample) -> bool:
    return one.weight == 0 or bool(one.example.messages)
