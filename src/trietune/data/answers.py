"""Rows of which each holds several answers: a pair, a ranked set, every label of a task.

    rows              0                    1
    sequences         0        1           2        3        4        one an answer, those of a row side by side
    row_start         0                    2                          5
    grade             1 chosen 0 rejected  3 best   2        1        a greater one is better; equal ones are a tie

What is drawn, counted and put into a batch are rows, so that answers which are compared always meet in one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trietune.data.examples import IGNORED_LABEL, TokenSequences


@dataclass(frozen=True, slots=True)
class AnswerSets:
    """Token sequences, and which of them belong to one row.

    Attributes:
        input_ids, labels, offsets: as in `TokenSequences`; S sequences.
        row_start: int64 [R + 1], the first sequence of each row.
        grade: float64 [S], a greater one is better.
        is_trained: bool [S]; False for what is only scored, never learned from.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    row_start: np.ndarray
    grade: np.ndarray
    is_trained: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_rows(self) -> int:
        return len(self.row_start) - 1

    def sequences_of(self, rows: np.ndarray) -> np.ndarray:
        """The sequences of these rows, in their order; int64."""
        return flat_ranges(self.row_start[rows], self.row_start[rows + 1])

    def parts_of(self, rows: np.ndarray) -> list[np.ndarray]:
        """The sequences of these rows, apart: those that are learned from, and those that are only scored, if any."""
        return self.apart(self.sequences_of(rows))

    def apart(self, sequences: np.ndarray) -> list[np.ndarray]:
        """These sequences, apart: those that are learned from, and those that are only scored, if any."""
        is_trained = self.is_trained[sequences]
        parts = [sequences[is_trained], sequences[~is_trained]]
        return [part for part in parts if len(part)]

    @property
    def first_answers(self) -> AnswerSets:
        """Each row by its first answer only: enough to tell which rows share a prompt."""
        return take_sequences(self, self.row_start[:-1])


def take_sequences(sets: AnswerSets, chosen: np.ndarray) -> AnswerSets:
    """The `chosen` sequences, each a row of its own."""
    offsets = np.asarray(sets.offsets)
    at = flat_ranges(offsets[chosen], offsets[chosen + 1])
    lengths = offsets[chosen + 1] - offsets[chosen]
    return AnswerSets(
        input_ids=np.asarray(sets.input_ids[at]),
        labels=np.asarray(sets.labels[at]),
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        row_start=np.arange(len(chosen) + 1),
        grade=sets.grade[chosen],
        is_trained=sets.is_trained[chosen],
    )


def with_other_completions(sequences: TokenSequences, grade: np.ndarray) -> AnswerSets:
    """Each sequence followed by its prompt with the completion of the one before it; the first takes the last one's.

        P0 C0, P1 C1, P2 C2   ->   P0 C0, P0 C2,   P1 C1, P1 C0,   P2 C2, P2 C1

    The second of each row is only scored. Prompt and completion are tokenized apart, so this is what tokenizing the
    texts would give.

    Args:
        grade: float64 [B], of each sequence: 1 if it is wanted, -1 if it is not.
    """
    offsets, input_ids, labels = (np.asarray(a) for a in (sequences.offsets, sequences.input_ids, sequences.labels))
    num = len(offsets) - 1
    own = np.arange(num)
    other = np.roll(own, 1)
    first = first_labels(labels, offsets)
    begin = np.stack([offsets[:-1], first, offsets[:-1], first[other]], 1).ravel()
    end = np.stack([first, offsets[1:], first, offsets[1:][other]], 1).ravel()
    at = flat_ranges(begin, end)
    lengths = (end - begin).reshape(-1, 2).sum(1)
    return AnswerSets(
        input_ids=input_ids[at],
        labels=labels[at],
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        row_start=np.arange(num + 1) * 2,
        grade=np.stack([grade, np.zeros(num)], 1).ravel(),
        is_trained=np.tile([True, False], num),
    )


def with_every_label(sequences: TokenSequences, completions: Sequence[np.ndarray]) -> AnswerSets:
    """Each prompt followed by every label's completion in turn; the grade of the example's own is 1, of others 0.

    Args:
        completions: token ids of each label's completion, its end among them.

    Raises:
        ValueError: a sequence has none of them; its argument is the index.
    """
    offsets, input_ids, labels = (np.asarray(a) for a in (sequences.offsets, sequences.input_ids, sequences.labels))
    num, num_labels = len(offsets) - 1, len(completions)
    first = first_labels(labels, offsets)
    pool = np.concatenate([*completions]).astype(np.int32)
    sizes = np.array([len(completion) for completion in completions])
    starts = np.cumsum(sizes) - sizes
    number_of = {np.asarray(one, np.int32).tobytes(): number for number, one in enumerate(completions)}
    grade = np.zeros((num, num_labels))
    for index in range(num):
        own = np.ascontiguousarray(input_ids[first[index] : offsets[index + 1]], np.int32).tobytes()
        if own not in number_of:
            raise ValueError(index)
        grade[index, number_of[own]] = 1.0
    prompt_begin, prompt_end = np.repeat(offsets[:-1], num_labels), np.repeat(first, num_labels)
    lengths = (prompt_end - prompt_begin) + np.tile(sizes, num)
    bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    tokens = np.empty(bounds[-1], np.int32)
    targets = np.full(bounds[-1], IGNORED_LABEL, np.int32)
    in_prompt = flat_ranges(bounds[:-1], bounds[:-1] + prompt_end - prompt_begin)
    in_completion = flat_ranges(bounds[1:] - np.tile(sizes, num), bounds[1:])
    said = pool[flat_ranges(np.tile(starts, num), np.tile(starts + sizes, num))]
    tokens[in_prompt] = input_ids[flat_ranges(prompt_begin, prompt_end)]
    tokens[in_completion] = targets[in_completion] = said
    return AnswerSets(
        input_ids=tokens,
        labels=targets,
        offsets=bounds,
        row_start=np.arange(num + 1) * num_labels,
        grade=grade.ravel(),
        is_trained=np.ones(num * num_labels, bool),
    )


def first_labels(labels: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Where each sequence's first label is; its end if it has none. int64 [B]."""
    labeled = np.append(np.flatnonzero(labels != IGNORED_LABEL), offsets[-1])
    first: np.ndarray = np.minimum(labeled[np.searchsorted(labeled, offsets[:-1])], offsets[1:])
    return first


def flat_ranges(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """`begin[0] .. end[0] - 1, begin[1] .. end[1] - 1, ...`; int64."""
    lengths = np.asarray(end, np.int64) - begin
    before = np.cumsum(lengths) - lengths
    flat: np.ndarray = np.arange(lengths.sum()) + np.repeat(begin - before, lengths)
    return flat
