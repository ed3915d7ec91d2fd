"""What data is once it has been read: examples as text, then token sequences with labels.

    Example(prompt="Review: fine\\nOutput:", completion=' {"label": "positive"}')

    input_ids     <bos> Review : fine \\n Output :  {" label ": " positive "}  <eos>
    labels         -100  -100 ...            -100  {" label ": " positive "}  <eos>

`labels[i]` belongs to `input_ids[i]`, as everywhere in the field: it is predicted from the tokens before `i`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        weight: multiplies the losses of its labels; at 0 it has none.
        more: its other keys for the chat template, as a JSON object; `"content": null` in it takes the place of an
            empty content.
    """

    role: str
    content: str
    weight: float = 1.0
    more: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """What a chat template sees of it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.more) if self.more else {})}


@dataclass(frozen=True, slots=True)
class Example:
    """One training or validation example as text.

    `messages` is set instead of `prompt` and `completion` for conversations; then labels are on every assistant turn.
    `tools` are those that the conversation may call, as JSON text of a list; empty if there are none.
    `answers` are all gold answers of a question (empty for an unanswerable one), for exact match and F1.
    `id` is unique within a split and names the place in the source: `train.tsv:17`, or the data set's own id. Answers
    that are compared share the id of their row.
    """

    id: str
    prompt: str
    completion: str
    answers: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()
    tools: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """What a right answer is, and so how to measure it.

    `labels`: classification; `labels` are the completions to choose from, in the order of the data set's label
    numbers, `label_names` their short names. `answers`: question answering, exact match and F1. `text`: anything
    else, only loss and perplexity.
    """

    kind: Literal["labels", "answers", "text"]
    labels: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()


class ExampleSource(Protocol):
    """Random access to examples as text, for printing and evaluation."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


@dataclass(frozen=True, slots=True)
class TokenSequences:
    """Token sequences with labels, flat, so that a million examples are three arrays (memory-mapped when cached).

    Sequence `i` is `input_ids[offsets[i] : offsets[i + 1]]`, with `labels` alike.

    Attributes:
        input_ids: int32 [total tokens].
        labels: int32 [total tokens]; `IGNORED_LABEL` where a token is not to be learned.
        offsets: int64 [number of sequences + 1].
        ids: the example id of each sequence.
        examples: the text that sequence `i` was made of, at the same index.
        row_start: for answers that are compared, int64 [rows + 1]: the first sequence of each row; else None, and each
            sequence is a row of its own.
        grades: for such answers, float64 [number of sequences]: a greater one is better.
        weights: float64 [total tokens], what multiplies the loss of each label; None where that is 1 everywhere.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    ids: Sequence[str]
    examples: ExampleSource
    row_start: np.ndarray | None = None
    grades: np.ndarray | None = None
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_rows(self) -> int:
        """What a batch counts: examples, or sets of answers that are compared."""
        return len(self) if self.row_start is None else len(self.row_start) - 1

    def sequences_of(self, rows: np.ndarray) -> np.ndarray:
        """The sequences of these rows, in their order; int64."""
        if self.row_start is None:
            return rows
        lengths = self.row_start[rows + 1] - self.row_start[rows]
        before = np.cumsum(lengths) - lengths
        flat: np.ndarray = np.arange(lengths.sum()) + np.repeat(self.row_start[rows] - before, lengths)
        return flat

    def parts_of(self, rows: np.ndarray) -> list[np.ndarray]:
        """The sequences of these rows, in parts that are laid out apart: here one."""
        return [self.sequences_of(rows)]

    def apart(self, sequences: np.ndarray) -> list[np.ndarray]:
        """These sequences, in parts that are laid out apart: here one, unless there are none."""
        return [sequences] if len(sequences) else []

    def row_id(self, row: int) -> str:
        """The id of a row's example, or of the row that its answers share."""
        return self.ids[row if self.row_start is None else int(self.row_start[row])]
