"""What is counted while rows become sequences: what was kept, what was left out, and what stops the run."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trietune.data.cache import CacheWriter
from trietune.data.counts import SAMPLES_KEPT, Count, SplitCounts
from trietune.data.encoder import EncodedExamples
from trietune.data.examples import IGNORED_LABEL, Example
from trietune.data.taken import LeftByTemplate
from trietune.errors import UserError

# Completions are tallied until there are more different ones than any set of labels has.
COMPLETIONS_TALLIED = 500


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


@dataclass(slots=True)
class Tally:
    """Counts that grow with the blocks. Examples are remembered by an 8-byte hash each, never by their text."""

    source: str
    seen: int = 0
    read: int = 0
    num_examples: int = 0
    counts: SplitCounts = field(default_factory=lambda: SplitCounts(source=""))
    problems: Problems = field(
        default_factory=lambda: Problems("cannot be used", "correct or remove them; nothing is skipped silently")
    )
    too_long: Problems = field(
        default_factory=lambda: Problems(
            "are too long, and `overlong: error` is set", "raise `max_length`, or write `overlong: truncate_prompt`"
        )
    )
    hashes: array[int] = field(default_factory=lambda: array("q"))
    completions: Counter[str] | None = field(default_factory=Counter)
    completion_places: dict[str, str] = field(default_factory=dict)
    own_ids: set[str] = field(default_factory=set)

    def add(self, examples: Sequence[Example], encoded: EncodedExamples) -> None:
        self.hashes.extend(hash((one.prompt, one.completion, one.messages, one.tools)) for one in examples)
        if self.completions is not None:
            self.completions.update(one.completion for one in examples)
            for one in examples:
                self.completion_places.setdefault(one.completion, one.id)
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

    def take_over(self, left: LeftByTemplate) -> None:
        """Count what the chat template left out."""
        self.counts = replace(
            self.counts,
            cut_reasoning=left.reasoning,
            cut_text=left.text,
            unseen_messages=left.messages,
            unused_keys=left.unused_keys(),
            num_with_more=left.num_with_more,
        )

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
            completion_places=self.completion_places if self.completions else {},
        )
