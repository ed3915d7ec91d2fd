"""Hypothesis strategies and random batches that share prefixes, for every test of tries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

IGNORED = -100


@dataclass(frozen=True, slots=True)
class FlatSequences:
    """What `make_micro_batches` asks for: tokens, labels and bounds, flat."""

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1


def flat(tokens: list[list[int]], labels: list[list[int]]) -> FlatSequences:
    lengths = [len(sequence) for sequence in tokens]
    return FlatSequences(
        np.array([t for sequence in tokens for t in sequence], np.int32),
        np.array([t for sequence in labels for t in sequence], np.int32),
        np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
    )


@st.composite
def batches(draw: st.DrawFn, max_sequences: int = 9, max_length: int = 8) -> tuple[list[list[int]], list[list[int]]]:
    """Sequences over so few tokens that prefixes, whole sequences and labels at branch points coincide often."""
    alphabet = draw(st.integers(1, 4))
    tokens = draw(
        st.lists(
            st.lists(st.integers(0, alphabet), min_size=1, max_size=max_length), min_size=1, max_size=max_sequences
        )
    )
    labels = [[t if draw(st.booleans()) else IGNORED for t in sequence] for sequence in tokens]
    return tokens, labels


def question_batch(
    generator: np.random.Generator, *, vocabulary: int, paragraphs: int = 3, questions: int = 4, scale: int = 1
) -> FlatSequences:
    """Paragraphs with several questions each, some questions with a common beginning, completions labeled.

    One sequence stands twice, one is a prefix of another, one has a single token and one no label.
    """
    tokens, labels = [], []
    opening = generator.integers(3, vocabulary, 2).tolist()
    for _ in range(paragraphs):
        paragraph = opening + generator.integers(3, vocabulary, int(generator.integers(6, 18)) * scale).tolist()
        stem = generator.integers(3, vocabulary, 2).tolist()
        for _ in range(questions):
            prompt = (
                paragraph + stem + generator.integers(3, vocabulary, int(generator.integers(1, 6)) * scale).tolist()
            )
            completion = [*generator.integers(3, vocabulary, int(generator.integers(1, 4))).tolist(), 1]
            tokens.append(prompt + completion)
            labels.append([IGNORED] * len(prompt) + completion)
    tokens.append(list(tokens[0]))
    labels.append(list(labels[0]))
    tokens.append(tokens[1][:-1])
    labels.append([IGNORED] * (len(tokens[1]) - 2) + [tokens[1][-2]])
    tokens += [[5], tokens[2][:7]]
    labels += [[5], [IGNORED] * 7]
    return flat(tokens, labels)
