"""What does not fit, or has no label, leaves a block of encoded examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from trietune.data.encoder import EncodedExamples, Encoder
from trietune.data.examples import IGNORED_LABEL
from trietune.data.read_row import LengthRules, ReadExample
from trietune.data.tally import Tally
from trietune.data.weights import weigh

_T = TypeVar("_T")


def weighted(
    encoded: EncodedExamples, read: Sequence[ReadExample], rules: LengthRules, encoder: Encoder, tally: Tally
) -> tuple[EncodedExamples, Sequence[ReadExample]]:
    """With the weights of rows and messages; what has only labels of weight 0 is left out of training data."""
    examples = [one.example for one in read]
    only_last = encoder.prompt_format.is_turn_by_turn
    had_labels = _have_labels(encoded)
    encoded = weigh(encoded, examples, [one.weight for one in read], only_last=only_last)
    is_empty = had_labels & ~_have_labels(encoded)
    tally.count("without_weight", [one.place for one, empty in zip(read, is_empty.tolist(), strict=True) if empty])
    if rules.keeps_empty or not is_empty.any():
        return encoded, read
    return take(encoded, ~is_empty), chosen(read, ~is_empty)


def _have_labels(encoded: EncodedExamples) -> np.ndarray:
    counts = np.concatenate(([0], np.cumsum(encoded.labels != IGNORED_LABEL)))
    ends = np.cumsum(encoded.lengths)
    found: np.ndarray = counts[ends] > counts[ends - encoded.lengths]
    return found


def encode_tokens(tokens: Sequence[tuple[list[int], list[int]]]) -> EncodedExamples:
    lengths = np.array([len(ids) for ids, _ in tokens], np.int64)
    input_ids = np.array([one for ids, _ in tokens for one in ids], np.int32)
    labels = np.array([one for _, own in tokens for one in own], np.int32)
    labels[(np.cumsum(lengths) - lengths)[lengths > 0]] = IGNORED_LABEL
    return EncodedExamples(input_ids, labels, lengths)


def find_labeled(encoded: EncodedExamples) -> np.ndarray:
    """Which sequences have a label; bool [examples]."""
    of_token = np.repeat(np.arange(len(encoded.lengths)), encoded.lengths)
    labeled = of_token[encoded.labels != IGNORED_LABEL]
    return np.bincount(labeled, minlength=len(encoded.lengths)) > 0


def fit(
    encoded: EncodedExamples, read: Sequence[ReadExample], rules: LengthRules, encoder: Encoder, tally: Tally
) -> tuple[EncodedExamples, Sequence[ReadExample]]:
    """Apply `max_length`: leave out, cut or refuse what is longer."""
    is_long = encoded.lengths > rules.max_length
    if not is_long.any():
        return encoded, read
    places = [one.place for one in read]
    if rules.overlong == "error":
        lengths = encoded.lengths[is_long].tolist()
        for place, length in zip(chosen(places, is_long), lengths, strict=True):
            tally.too_long.add(place, f"{length} tokens, and `max_length` is {rules.max_length}")
        return take(encoded, ~is_long), chosen(read, ~is_long)
    if rules.overlong == "truncate_prompt":
        encoded, is_cut = _cut_prompts(encoded, rules.max_length, has_bos=encoder.prompt_format.bos_id is not None)
        tally.count("truncated", chosen(places, is_cut))
        is_long &= ~is_cut
    tally.count("overlong", chosen(places, is_long))
    if rules.overlong is None:
        return encoded, read
    return take(encoded, ~is_long), chosen(read, ~is_long)


def _cut_prompts(encoded: EncodedExamples, max_length: int, *, has_bos: bool) -> tuple[EncodedExamples, np.ndarray]:
    """Take tokens away behind BOS, never a label; what is too long by its labels stays as it is.

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


def take(encoded: EncodedExamples, mask: np.ndarray) -> EncodedExamples:
    of_token = np.repeat(mask, encoded.lengths)
    weights = None if encoded.weights is None else encoded.weights[of_token]
    return EncodedExamples(encoded.input_ids[of_token], encoded.labels[of_token], encoded.lengths[mask], weights)


def chosen(values: Sequence[_T], mask: np.ndarray) -> list[_T]:
    return [values[index] for index in np.flatnonzero(mask).tolist()]
