"""What was read, kept and left out of a data set, with places to look at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from trietune.io.json_types import JsonMapping, JsonObject

# Enough to see what kind of thing went wrong, few enough to read.
SAMPLES_KEPT = 10


@dataclass(frozen=True, slots=True)
class Count:
    """How many, and the first few of them by place: `train.tsv:17`."""

    number: int = 0
    samples: tuple[str, ...] = ()

    def plus(self, places: Sequence[str]) -> Count:
        return Count(self.number + len(places), (*self.samples, *places[: SAMPLES_KEPT - len(self.samples)]))


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """Of one split.

    Attributes:
        source: file or data set, as a person would name it.
        read: rows that were read.
        num_examples: examples in them; more than rows where each turn of a conversation is one.
        kept: examples that became sequences.
        num_tokens, num_labels, longest: counts of the kept sequences; `longest` in tokens.
        overlong: longer than `max_length`; left out in training, kept in validation.
        truncated: cut to `max_length` at the left of their prompt.
        without_completion: nothing to learn but the end; left out in training, kept in validation.
        missing_in_words: completions such as `nan` and `None`, which may stand for a missing value; kept as text.
        without_labels: not a single label, so there is nothing to learn or to measure; left out.
        padded: tokens whose `attention_mask` hides padding, which was taken away.
        without_prompt: a column of the prompt is empty; kept.
        duplicates: equal to an earlier example; kept.
        without_weight: whose weight is 0 everywhere; left out (validation knows no weights of rows).
        unlearnt: answers of conversations that are not learned, because their weight is 0.
        cut_reasoning, cut_text: answers of which the chat template leaves out reasoning, or other text.
        unseen_messages: messages to the assistant that the chat template does not write.
        unused_keys: keys of messages that the chat template does not take, and the messages that have them.
        late_columns: columns that nothing uses and that the first row has not, and the rows that have them.
        num_with_more: conversations whose messages have more than a role and a content, or that come with tools.
        equal_answers: answers that equal another one of their row; left out.
        without_pair: rows of preferences that prefer no answer to another; left out.
        completions: how often each completion occurs, if there are few; else empty.
        completion_places: the first example that has each of these.
    """

    source: str
    read: int = 0
    num_examples: int = 0
    kept: int = 0
    num_tokens: int = 0
    num_labels: int = 0
    longest: int = 0
    overlong: Count = field(default_factory=Count)
    truncated: Count = field(default_factory=Count)
    without_completion: Count = field(default_factory=Count)
    without_prompt: Count = field(default_factory=Count)
    duplicates: Count = field(default_factory=Count)
    without_labels: Count = field(default_factory=Count)
    padded: Count = field(default_factory=Count)
    without_weight: Count = field(default_factory=Count)
    equal_answers: Count = field(default_factory=Count)
    without_pair: Count = field(default_factory=Count)
    completions: Mapping[str, int] = field(default_factory=dict)
    completion_places: Mapping[str, str] = field(default_factory=dict)
    unlearnt: Count = field(default_factory=Count)
    cut_reasoning: Count = field(default_factory=Count)
    cut_text: Count = field(default_factory=Count)
    unseen_messages: Count = field(default_factory=Count)
    unused_keys: Mapping[str, Count] = field(default_factory=dict)
    num_with_more: int = 0
    late_columns: Mapping[str, Count] = field(default_factory=dict)
    missing_in_words: Count = field(default_factory=Count)

    @classmethod
    def from_dict(cls, values: JsonMapping) -> SplitCounts:
        """The opposite of `dataclasses.asdict`, from JSON."""
        counts: JsonObject = {name: _to_count(value) for name, value in values.items() if _is_count(value)}
        by_name: JsonObject = {
            field_name: {name: _to_count(value) for name, value in values.get(field_name, {}).items()}
            for field_name in ("unused_keys", "late_columns")
        }
        return cls(**{**values, **counts, **by_name})


@dataclass(frozen=True, slots=True)
class DataCounts:
    """Of all data of a run; `held_out` tells that validation is a part of the training data, set aside."""

    train: SplitCounts
    validation: SplitCounts | None
    held_out: bool = False


def merge(several: Sequence[SplitCounts], source: str) -> SplitCounts:
    """The counts of several splits as those of one.

    Completions are only tallied where all of them are; a place is that of the first split that has it.
    """
    sums: JsonObject = {}
    for one in fields(SplitCounts):
        values = [getattr(counts, one.name) for counts in several]
        if one.name == "longest":
            sums[one.name] = max(values)
        elif isinstance(values[0], Count):
            sums[one.name] = _sum_of(values)
        elif isinstance(values[0], int):
            sums[one.name] = sum(values)
    unused = _sums_by_name([counts.unused_keys for counts in several])
    late = _sums_by_name([counts.late_columns for counts in several])
    completions: dict[str, int] = {}
    places: dict[str, str] = {}
    if all(counts.completions for counts in several):
        for counts in several:
            for text, number in counts.completions.items():
                completions[text] = completions.get(text, 0) + number
            places = {**counts.completion_places, **places}
    return SplitCounts(
        **{**sums, "source": source},
        unused_keys=unused,
        late_columns=late,
        completions=completions,
        completion_places=places,
    )


def _sums_by_name(several: Sequence[Mapping[str, Count]]) -> dict[str, Count]:
    names = dict.fromkeys(name for counts in several for name in counts)
    return {name: _sum_of([counts.get(name, Count()) for counts in several]) for name in names}


def _sum_of(counts: Sequence[Count]) -> Count:
    samples = [place for count in counts for place in count.samples]
    return Count(sum(count.number for count in counts), tuple(samples[:SAMPLES_KEPT]))


def describe(counts: SplitCounts, *, is_training: bool, max_length: int) -> list[str]:
    """Lines for the user: what became of the split, each number with places where there is something to look at."""
    split = "training" if is_training else "validation"
    in_rows = f" in {counts.read:,} conversations" if counts.num_examples > counts.read else ""
    of_source = f"{counts.kept:,} of {counts.num_examples:,} examples{in_rows} of {counts.source}"
    lines = [f"{split}: {of_source}, {counts.num_tokens:,} tokens"]
    longer = f"longer than `max_length: {max_length}`"
    left_out = "left out" if is_training else "kept: validation drops nothing"
    for count, what in (
        (counts.overlong, f"{longer}, {left_out}"),
        (counts.truncated, f"{longer}, cut at the left of the prompt"),
        (counts.without_completion, f"without a completion, {left_out}"),
        (counts.missing_in_words, "whose completion reads as a missing value does (`nan`, `None`), kept as text"),
        (counts.without_labels, "without a label, left out"),
        (counts.padded, "whose `attention_mask` hides padding, which was taken away"),
        (counts.without_prompt, "with an empty text in the prompt, kept"),
        (counts.duplicates, "equal to an earlier one, kept"),
        (counts.without_weight, "of weight 0, left out"),
        (counts.unlearnt, "of the answers not learned, as their `weight`, `loss` or `train` says"),
        (counts.cut_reasoning, "of the answers without their reasoning, which the chat template leaves out"),
        (counts.cut_text, "of the answers not written by the chat template as they are"),
        (counts.unseen_messages, "of the other messages not written by the chat template, or not as they are"),
        *(
            (count, f"with `{name}`, which the chat template does not take")
            for name, count in counts.unused_keys.items()
        ),
        *(
            (count, f"with a column `{name}`, which the first row has not and nothing uses")
            for name, count in counts.late_columns.items()
        ),
        (counts.equal_answers, "answers equal to another one of their row, left out"),
        (counts.without_pair, "without two answers of which one is better, left out"),
    ):
        if count.number:
            lines.append(f"{split}: {count.number:,} {what} ({name_places(count.samples, count.number)})")
    return lines


def name_places(samples: Iterable[str], number: int) -> str:
    """`train.tsv:4, train.tsv:9, ...`"""
    first = list(samples)[:3]
    return ", ".join(first) + (", ..." if number > len(first) else "")


def _to_count(value: JsonMapping) -> Count:
    return Count(value["number"], tuple(value["samples"]))


def _is_count(value: object) -> bool:
    return isinstance(value, Mapping) and value.keys() == {"number", "samples"}
