"""Show what a few examples became: each token as text, with whether it is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trietune.data.examples import IGNORED_LABEL, TokenSequences


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token as the text that it adds; special tokens by name."""

    text: str
    is_label: bool


@dataclass(frozen=True, slots=True)
class ExamplePreview:
    """An example's tokens; their texts joined are the example with its special tokens."""

    id: str
    tokens: tuple[TokenText, ...]


def preview_examples(sequences: TokenSequences, tokenizer: Any, count: int = 3) -> list[ExamplePreview]:
    """The first `count` examples, token by token.

    Args:
        tokenizer: the fast `transformers` tokenizer that they were made with.
    """
    return preview_at(sequences, tokenizer, range(min(count, len(sequences))))


def preview_longest(sequences: TokenSequences, tokenizer: Any) -> ExamplePreview:
    """The example with the most tokens, the first one of several, token by token."""
    return preview_at(sequences, tokenizer, [int(np.argmax(np.diff(np.asarray(sequences.offsets))))])[0]


def preview_at(sequences: TokenSequences, tokenizer: Any, indices: Sequence[int]) -> list[ExamplePreview]:
    """The examples at `indices`, token by token."""
    previews = []
    for index in indices:
        tokens = slice(int(sequences.offsets[index]), int(sequences.offsets[index + 1]))
        texts = split_text(sequences.input_ids[tokens].tolist(), tokenizer)
        labels = (sequences.labels[tokens] != IGNORED_LABEL).tolist()
        pairs = zip(texts, labels, strict=True)
        previews.append(ExamplePreview(sequences.ids[index], tuple(TokenText(text, label) for text, label in pairs)))
    return previews


def split_text(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text of those before it."""
    backend = tokenizer.backend_tokenizer
    texts = []
    before = ""
    for end in range(1, len(ids) + 1):
        after = backend.decode(ids[:end], skip_special_tokens=False)
        # A character may take several tokens; the last of them shows it, and those before show nothing.
        if after.endswith("\ufffd") and end < len(ids):
            after = before
        texts.append(after[len(before) :])
        before = after
    return texts
