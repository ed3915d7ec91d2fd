"""What a right answer is, as far as the completions of the data tell."""

from __future__ import annotations

from trietune.data.counts import SplitCounts
from trietune.data.examples import Task
from trietune.data.tally import COMPLETIONS_TALLIED

# Custom data is a choice between labels if its completions are few, short, and each seen several times.
LABEL_SEEN_AT_LEAST = 3
LABEL_CHARACTERS_AT_MOST = 60


def find_label_task(train: SplitCounts, validation: SplitCounts | None) -> Task:
    """A choice between labels, if the completions look like one; else plain text."""
    seen = train.completions
    unseen = set(validation.completions) - set(seen) if validation is not None else set()
    tallied = validation is None or bool(validation.completions)
    is_choice = (
        2 <= len(seen) <= COMPLETIONS_TALLIED
        and tallied
        and not unseen
        and all(number >= LABEL_SEEN_AT_LEAST for number in seen.values())
        and all(text.strip() and len(text) <= LABEL_CHARACTERS_AT_MOST for text in seen)
    )
    if not is_choice:
        return Task(kind="text")
    labels = tuple(sorted(seen))
    return Task(kind="labels", labels=labels, label_names=tuple(label.strip() for label in labels))
