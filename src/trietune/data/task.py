"""What a right answer is: as `task` says, or as far as the completions of the data tell.

60 rows, ` good` 30, ` bad` 29, ` godo` 1          labels; the rare one is listed
30 rows, ten answers, three times each             text: too many values for so few rows
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from trietune.config.settings import Settings
from trietune.data.columns import RowFormat, RowFormatKind
from trietune.data.counts import SplitCounts
from trietune.data.examples import Task
from trietune.data.tally import COMPLETIONS_TALLIED
from trietune.data.templates import SQUAD_TASK, SST2_TASK
from trietune.errors import UserError

# Labels that nobody named are few, short, and seen often: names of classes come back, sentences that answer rarely do.
LABELS_AT_MOST = 100
LABEL_CHARACTERS_AT_MOST = 60
LABEL_WORDS_AT_MOST = 5
SEEN_AT_LEAST = 3
# Rows for each label, on the average: more where there are many of them, and many more where they read like answers.
SEEN_ON_AVERAGE, SEEN_OF_MANY, SEEN_OF_SENTENCES = 3.0, 4.0, 20.0
FEW_LABELS = 5
# What is seen less often may be misspelt; more than this share of the rows is no matter of spelling.
RARE_SHARE_AT_MOST = 0.1
NAMED_AT_MOST = 8

TaskChoice = Literal["auto", "labels", "answers", "text"]


def decide_task(
    settings: Settings,
    row_format: RowFormat,
    train: SplitCounts,
    validation: SplitCounts | None,
    report: Callable[[str], None],
) -> Task:
    """The task of a run on this data; preferences have that of their form.

    Raises:
        UserError: as `find_task`; or a task is named where the objective measures preferences.
    """
    if not settings.learns_preferences:
        return find_task(settings.task, row_format.kind, train, validation, report)
    if settings.task != "auto":
        raise UserError(
            f"`task: {settings.task}` has no meaning under `objective: {settings.objective}`, which measures how "
            "often the better answer wins",
            next_step="task: auto",
        )
    return row_format.task


def find_task(
    choice: TaskChoice,
    kind: RowFormatKind,
    train: SplitCounts,
    validation: SplitCounts | None,
    report: Callable[[str], None],
) -> Task:
    """The task of a data set, with a line that says what was decided and why.

    Args:
        choice: the key `task`.
        kind: of the rows; SST-2 and SQuAD bring their tasks.

    Raises:
        UserError: the data cannot have the task that `choice` names.
    """
    built_in = {"sst2": SST2_TASK, "squad": SQUAD_TASK}.get(kind)
    if built_in is not None and choice in ("auto", built_in.kind):
        return built_in
    if choice == "text" or (choice == "auto" and kind not in ("templates", "columns")):
        return Task("text")
    if kind == "tokens" or (choice == "labels" and kind not in ("templates", "columns")):
        raise UserError(
            f"`task: {choice}` is measured on prompts and completions, and `{train.source}` holds {_IN_WORDS[kind]}",
            next_step="task: text     (or give the data columns `prompt` and `completion`)",
        )
    if choice == "answers":
        return Task("answers")
    seen = Counter(train.completions)
    seen.update(validation.completions if validation is not None else {})
    is_tallied = bool(train.completions) and (validation is None or bool(validation.completions))
    if choice == "auto":
        reason = _why_no_labels(seen) if is_tallied else f"more than {COMPLETIONS_TALLIED} values"
        if reason is not None:
            if train.completions and _why_no_labels(Counter(train.completions)) is None:
                report(
                    f"task: text, so only the loss is measured; the completions of `{train.source}` look like labels, "
                    f"and with those of the validation data there are {reason}: check that they belong together"
                )
            elif is_tallied and len(seen) <= train.kept / 2:
                report(
                    f"task: text, so only the loss is measured; completions repeat, but are not labels ({reason}): "
                    "`task: labels` measures accuracy, `task: answers` exact match and F1"
                )
            return Task("text")
    elif not is_tallied or len({one.strip() for one in seen}) < 2:
        found = len({one.strip() for one in seen}) if is_tallied else f"more than {COMPLETIONS_TALLIED}"
        raise UserError(
            f"`task: labels` chooses between a few completions, and `{train.source}` has {found}",
            next_step="task: answers     (exact match and F1), or task: text",
        )
    task = _labels(seen)
    names = sorted(set(task.label_names))
    reason = f"completions take {len(names)} values" if choice == "auto" else "as the key says"
    report(
        f"task: labels, {reason} ({_some(names)}): accuracy is measured on them"
        + ("; `task: text` measures the loss alone" if choice == "auto" else "")
    )
    _report_odd(seen, train, validation, report)
    return task


def _labels(seen: Counter[str]) -> Task:
    labels = tuple(sorted(seen))
    return Task(kind="labels", labels=labels, label_names=tuple(label.strip() for label in labels))


def _why_no_labels(seen: Counter[str]) -> str | None:
    names = _by_name(seen)
    total = sum(names.values())
    average = total / max(1, len(names))
    rare = sum(count for count in names.values() if count < SEEN_AT_LEAST)
    if len(names) < 2:
        return "all of them are equal"
    if len(names) > LABELS_AT_MOST:
        return f"{len(names)} values"
    if not all(names) or max(map(len, names)) > LABEL_CHARACTERS_AT_MOST:
        return "some are empty, or longer than a name"
    are_sentences = any(len(name.split()) > LABEL_WORDS_AT_MOST or name.endswith((".", "!", "?")) for name in names)
    needed = SEEN_OF_SENTENCES if are_sentences else SEEN_ON_AVERAGE if len(names) <= FEW_LABELS else SEEN_OF_MANY
    if average < needed or rare > RARE_SHARE_AT_MOST * total:
        return f"{len(names)} values in {total} rows"
    return None


def _report_odd(
    seen: Counter[str], train: SplitCounts, validation: SplitCounts | None, report: Callable[[str], None]
) -> None:
    """Rare labels, labels that differ in spaces, and labels that are never learned."""
    names = _by_name(seen)
    rare = {name: count for name, count in names.items() if count < SEEN_AT_LEAST}
    if rare:
        places = {**(validation.completion_places if validation is not None else {}), **train.completion_places}
        place_of = {text.strip(): place for text, place in places.items()}
        listed = [f"`{name}` {count}x ({place_of.get(name, '?')})" for name, count in sorted(rare.items())]
        more = f", and {len(listed) - NAMED_AT_MOST} more" if len(listed) > NAMED_AT_MOST else ""
        report(f"rare labels, perhaps misspelt: {', '.join(listed[:NAMED_AT_MOST])}{more}")
    spaced = [name for name in names if sum(text.strip() == name for text in seen) > 1]
    if spaced:
        report(f"labels that differ only in spaces at their ends count as one: {_some(spaced)}")
    alike: dict[str, list[str]] = {}
    for name in sorted(names):
        alike.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    written = [name for group in alike.values() if len(group) > 1 for name in group]
    if written:
        report(f"labels that differ only in case or in how they are encoded are not the same: {_some(written)}")
    unlearnt = {text.strip() for text in seen} - {text.strip() for text in train.completions}
    if unlearnt:
        report(f"labels of the validation data that no training example has: {_some(sorted(unlearnt))}")


def _by_name(seen: Counter[str]) -> Counter[str]:
    names: Counter[str] = Counter()
    for text, count in seen.items():
        names[text.strip()] += count
    return names


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED_AT_MOST]) + (", ..." if len(names) > NAMED_AT_MOST else "")


_IN_WORDS: dict[RowFormatKind, str] = {
    "tokens": "tokens",
    "messages": "conversations",
    "text": "texts without a prompt",
    "squad": "questions with answers of all kinds",
    "sst2": "SST-2",
}
