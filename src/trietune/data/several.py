"""Several files or data sets in one run: each read by its own form, then joined.

    train_file: [chats.jsonl, reviews.csv]     chats become conversations, reviews go through their templates
    data_shares: [1, 0.5]                      all chats, and half of the reviews

Each has a task of its own, by which its part of the validation data is measured beside the whole. What is asked later,
without a word on where it comes from, is asked in the form of the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from trietune.config.settings import Settings
from trietune.data.cache import make_key
from trietune.data.columns import RowFormat
from trietune.data.counts import DataCounts, SplitCounts, merge
from trietune.data.examples import Task, TokenSequences
from trietune.data.folders import SplitRole
from trietune.data.forms import Reader, named, open_to_train
from trietune.data.held_out import describe_held_out, draw_held_out, report_shared_rows, rows_of_split
from trietune.data.loaded_data import Data
from trietune.data.loading import Loading, Watch
from trietune.data.parts import Part, draw_rows, join, join_parts, metric_names, told_apart
from trietune.data.preferences import AnswerForm
from trietune.data.reading import find_row_format
from trietune.data.rows import FileRows, Rows, with_places_of_their_own
from trietune.data.sources import Sources, find_sources, find_validation, settings_of_each
from trietune.data.system_prompt import common_system_prompt
from trietune.data.task import decide_task
from trietune.data.templates import PromptFormat
from trietune.errors import UserError

CHATS = ("messages", "answer_messages")


@dataclass(slots=True)
class _Opened:
    """One of the data sets; `settings` are those that it is read by."""

    settings: Settings
    sources: Sources
    watch: Watch
    name: str = ""
    row_format: RowFormat | None = None
    form: AnswerForm | None = None

    @property
    def source(self) -> str:
        return self.sources.train.name


@dataclass(slots=True)
class _Split:
    """The rows of one data set that are trained on, or measured."""

    opened: _Opened
    loading: Loading
    sequences: TokenSequences
    counts: SplitCounts
    key: str
    task: Task = Task("text")  # noqa: RUF009  (frozen)

    @property
    def form(self) -> PromptFormat:
        """How its rows are asked, whatever the task and the order of columns."""
        return form_of(self.loading.prompt_format)

    @property
    def prompt_format(self) -> PromptFormat:
        return replace(self.loading.prompt_format, task=self.task, source=self.opened.source)


def load_several(settings: Settings, reader: Reader) -> Data:
    """The training and validation data of several files or data sets.

    Raises:
        UserError: as `load_data`, naming the file; or the shares leave none of one.
    """
    report = reader.report
    opened, measured_files = _open_all(settings, reader)
    train: list[_Split] = []
    validation: list[tuple[_Split, _Split | None]] = []
    held: list[np.ndarray | None] = []
    for one in opened:
        has_own = bool(measured_files) or one.sources.validation is not None or not settings.do_validation
        held.append(None if has_own else draw_held_out(one.sources.train.count()))
        if (mask := held[-1]) is not None:
            report(describe_held_out(one.sources.train, mask))
    shares = settings.data_shares or (1.0,) * len(opened)
    limits = _limits(settings.max_train_examples, opened, held, shares)
    for one, held_out, limit in zip(opened, held, limits, strict=True):
        loading = _loading(one, reader)
        trained = _Split(
            one, loading, *loading.load(one.sources.train, is_training=True, held_out=held_out, limit=limit)
        )
        train.append(trained)
        rows = one.sources.validation if settings.do_validation and not measured_files else None
        if held_out is not None and held_out.any():
            rows = one.sources.train
        if rows is not None:
            found = loading.load(rows, is_training=False, held_out=held_out)
            validation.append((_Split(one, loading, *found), trained))
    for one in measured_files if settings.do_validation else ():
        loading = _loading(one, reader)
        found = loading.load(one.sources.train, is_training=False, held_out=None)
        validation.append((_Split(one, loading, *found), None))
    _find_tasks(settings, train, validation, reader)
    joined, train_key, lines = _join_training(settings, train, shares, reader)
    measured = [one for one, _ in validation]
    parts = _parts(measured)
    whole, validation_key = None, ""
    if parts:
        whole, validation_key = join_parts(parts, reader.cache_folder, reader.check_stop)
        report_shared_rows(joined, whole, report)
    prompt_format = _common_format(train, reader)
    hub_ids = [one.opened.sources.train.hub_id for one in train]
    measured_ids = {one.opened.sources.train.hub_id for one in measured}
    names = ", ".join(one.opened.source for one in train)
    counts = merge([one.counts for one in train], names)
    return Data(
        train=joined,
        validation=whole,
        fingerprint=make_key(train=train_key, validation=validation_key),
        train_fingerprint=train_key,
        validation_fingerprint=validation_key,
        counts=DataCounts(
            replace(counts, kept=len(joined)),
            merge([one.counts for one in measured], ", ".join(one.opened.source for one in measured))
            if measured
            else None,
            held_out=any(mask is not None for mask in held),
        ),
        task=prompt_format.task,
        prompt_format=prompt_format,
        parts=parts,
        lines=lines,
        source_name=names,
        trained_on=tuple(dict.fromkeys(one for one in hub_ids if one is not None)),
        measured_on=measured_ids.pop() if len(measured_ids) == 1 else None,
    )


def load_parts(
    settings: Settings, split: SplitRole | None, reader: Reader, trained_with: PromptFormat | None
) -> tuple[Part, ...]:
    """One split of each data set, to evaluate on, with nothing left out; by the forms of an adapter, if one is given.

    Args:
        split: as `load_split` takes it; validation files, where they are named, are the validation split.
    """
    opened, measured_files = _open_all(settings, reader)
    asked: list[tuple[_Opened, Rows, np.ndarray | None]] = []
    if measured_files and split != "train" and split != "test":
        asked = [(one, one.sources.train, None) for one in measured_files]
    else:
        for one in opened:
            sources = one.sources
            if measured_files and sources.validation is None:  # then nothing was held out
                sources = replace(sources, validation=sources.train)
            asked.append((one, *rows_of_split(sources, split, reader.report)))
    known = () if trained_with is None else (*trained_with.others, replace(trained_with, others=()))
    found: list[_Split] = []
    for one, rows, held_out in asked:
        loading = _loading(one, reader)
        used = find_format(known, loading.prompt_format, one.source)
        if used is not None:
            loading = replace(loading, prompt_format=replace(used, source=""))
        is_rest = split == "train" and held_out is not None
        split_of_one = _Split(
            one,
            replace(loading, weighting=None),
            *loading.load(rows, is_training=False, held_out=held_out, is_rest=is_rest),
        )
        is_known = used is not None and settings.task in ("auto", used.task.kind)
        split_of_one.task = (
            used.task if is_known and used is not None else _task_of(settings, split_of_one, None, reader)
        )
        found.append(split_of_one)
    return _parts(found)


def form_of(prompt_format: PromptFormat) -> PromptFormat:
    """The same without what differs between data sets that are asked alike: task, order of columns, system prompt."""
    columns = prompt_format.template_columns
    return replace(
        prompt_format,
        task=Task("text"),
        template_columns=None if columns is None else tuple(sorted(columns)),
        system_prompt="",
        source="",
        others=(),
    )


def find_format(known: Iterable[PromptFormat], own: PromptFormat, source: str) -> PromptFormat | None:
    """Of the formats that an adapter was trained with, the one of a data set: of its name, or the first of its form.

    None if its form is another than all of them.
    """
    alike = [one for one in known if form_of(one) == form_of(own)]
    return next((one for one in alike if one.source == source), alike[0] if alike else None)


def _open_all(settings: Settings, reader: Reader) -> tuple[list[_Opened], list[_Opened]]:
    """The training data sets, and the validation files if some are named, with the forms of their rows."""
    each = settings_of_each(settings)
    sources = [find_sources(one, report=reader.report) for one in each]
    measured = find_validation(settings, report=reader.report)
    sources, measured = _with_own_places(sources, measured)
    opened = [_Opened(one, found, Watch.of(found)) for one, found in zip(each, sources, strict=True)]
    without = settings.model_copy(update={"validation_file": None, "data_shares": None})
    files = [_Opened(without, found, Watch.of(found)) for found in measured]
    _check_apart(opened)
    for several in (opened, files):
        for one, name in zip(several, metric_names([one.source for one in several]), strict=True):
            one.name = name
    _find_forms([*opened, *files], settings, reader)
    return opened, files


def _with_own_places(
    sources: Sequence[Sources], measured: Sequence[Sources]
) -> tuple[list[Sources], tuple[Sources, ...]]:
    every = [
        rows for one in (*sources, *measured) for rows in (one.train, one.validation, one.test) if rows is not None
    ]
    named = iter(with_places_of_their_own(every, told_apart))

    def renamed(one: Sources) -> Sources:
        return replace(
            one,
            train=next(named),
            validation=None if one.validation is None else next(named),
            test=None if one.test is None else next(named),
        )

    return [renamed(one) for one in sources], tuple(renamed(one) for one in measured)


def _check_apart(opened: Sequence[_Opened]) -> None:
    seen: set[str] = set()
    for one in opened:
        rows = one.sources.train
        paths = {str(path.resolve()) for path in rows.paths} if isinstance(rows, FileRows) else set()
        if again := seen & paths:
            raise UserError(
                f"`{one.source}` is trained on twice: two of the data sets hold the same file",
                where=sorted(again)[0],
                next_step="name it once; `data_shares` takes a file more than once",
            )
        seen |= paths


def _find_forms(every: Sequence[_Opened], settings: Settings, reader: Reader) -> None:
    """The form of each. Templates, or the name of a task, are for those that have the columns."""
    refusals: list[tuple[_Opened, UserError]] = []
    for one in every:
        try:
            one.row_format, one.form = find_row_format(one.settings, one.sources)
        except UserError as error:
            own = one.settings.model_copy(update={"prompt_template": None, "completion_template": None})
            sources = replace(one.sources, task_name=None)
            is_shared = settings.prompt_template is not None or one.sources.task_name is not None
            if not is_shared or len(every) == 1:
                raise
            try:
                one.row_format, one.form = find_row_format(own, sources)
            except UserError:
                raise error from None
            one.settings, one.sources = own, sources
            refusals.append((one, error))
    if refusals and len(refusals) == len(every):
        raise refusals[0][1]
    for one, refusal in refusals:
        reader.report(f"`{one.source}` is read by its own form: {refusal.what}")
    has_chats = any(one.row_format is not None and one.row_format.kind in CHATS for one in every)
    for one in every:
        if has_chats and one.row_format is not None and one.row_format.kind not in CHATS:
            # They are for the conversations, and would be refused beside anything else.
            one.settings = one.settings.model_copy(update={"chat_template": None, "chat_system_prompt": None})


def _loading(one: _Opened, reader: Reader) -> Loading:
    assert one.row_format is not None
    return open_to_train(one.settings, one.sources, reader, watch=one.watch, found=(one.row_format, one.form))


def _limits(
    most: int | None, opened: Sequence[_Opened], held: Sequence[np.ndarray | None], shares: Sequence[float]
) -> list[int | None]:
    """How many rows of each are read, where only `most` examples are wanted of all together."""
    if most is None:
        return [None] * len(opened)
    sizes = [
        one.sources.train.count() if mask is None else int((~mask).sum())
        for one, mask in zip(opened, held, strict=True)
    ]
    used = [size * share for size, share in zip(sizes, shares, strict=True)]
    if sum(used) <= most:
        return list(sizes)
    exact = [most * size / sum(used) for size in sizes]
    limits = [max(1, int(one)) for one in exact]
    # What rounding down left over goes to those that lost most by it.
    for at in sorted(range(len(exact)), key=lambda at: limits[at] - exact[at]):
        if sum(limit * share for limit, share in zip(limits, shares, strict=True)) + shares[at] <= most:
            limits[at] += 1
    return list(limits)


def _find_tasks(
    settings: Settings,
    train: Sequence[_Split],
    validation: Sequence[tuple[_Split, _Split | None]],
    reader: Reader,
) -> None:
    measured_by = {id(trained): one for one, trained in validation if trained is not None}
    for one in train:
        one.task = _task_of(settings, one, measured_by.get(id(one)), reader)
    for form in dict.fromkeys(one.form for one in train):
        alike = [one for one in train if one.form == form]
        if len(alike) > 1 and {one.task.kind for one in alike} == {"labels"}:
            task = _with_labels(alike[0].task, (label for one in alike for label in one.task.labels))
            if any(one.task != task for one in alike):
                files = ", ".join(f"`{one.opened.source}`" for one in alike)
                reader.report(f"{files} are asked alike, so their {len(task.labels)} labels are one set")
            for one in alike:
                one.task = task
    for measured, trained in validation:
        if trained is not None:
            measured.task = trained.task
            continue
        tasks = {one.task for one in train if one.form == measured.form}
        if len(tasks) == 1 and settings.objective == "sft":
            measured.task = _with_labels(tasks.pop(), measured.counts.completions)
        else:
            measured.task = _task_of(settings, measured, None, reader)


def _with_labels(task: Task, labels: Iterable[str]) -> Task:
    if task.kind != "labels":
        return task
    every = tuple(sorted({*task.labels, *labels}))
    names = dict(zip(task.labels, task.label_names, strict=True))
    return (
        task
        if set(every) == names.keys()
        else Task("labels", every, tuple(names.get(one, one.strip()) for one in every))
    )


def _task_of(settings: Settings, one: _Split, measured: _Split | None, reader: Reader) -> Task:
    counts = None if measured is None else measured.counts
    return decide_task(settings, one.loading.row_format, one.counts, counts, named(reader.report, one.opened.source))


def _join_training(
    settings: Settings, train: Sequence[_Split], shares: Sequence[float], reader: Reader
) -> tuple[TokenSequences, str, tuple[str, ...]]:
    chosen: list[tuple[TokenSequences, np.ndarray]] = []
    for number, (one, share) in enumerate(zip(train, shares, strict=True)):
        num_rows = one.sequences.num_rows
        rows = draw_rows(num_rows, share, seed=settings.seed, number=number, source=one.opened.source)
        chosen.append((one.sequences, rows))
    is_drawn = any(share % 1 for share in shares)
    key = make_key(
        files=[one.key for one in train],
        shares=[float(share) for share in shares],
        **({"seed": settings.seed} if is_drawn else {}),
    )
    total = sum(len(rows) for _, rows in chosen)
    lines = []
    for one, share, (sequences, rows) in zip(train, shares, chosen, strict=True):
        taken = f"{len(rows):,} examples"
        if share < 1:
            left = sequences.num_rows - len(rows)
            taken = f"{len(rows):,} of {sequences.num_rows:,} examples, {left:,} left out by a share of {share:g}"
        elif share > 1:
            taken = f"{sequences.num_rows:,} examples, {len(rows):,} with a share of {share:g}"
        lines.append(f"{one.opened.source}: {taken}; {len(rows) / total:.0%} of an epoch")
        if share != 1:
            reader.report(f"training: {lines[-1]}")
    return join(chosen, reader.cache_folder, key, reader.check_stop), key, tuple(lines)


def _common_format(train: Sequence[_Split], reader: Reader) -> PromptFormat:
    """How the adapter is asked: as the first data set is, with a task that all of that form share."""
    first = train[0]
    alike = [one for one in train if one.form == first.form]
    task = first.task
    if len({one.task.kind for one in train}) > 1:
        told = ", ".join(f"`{one.opened.source}`: {one.task.kind}" for one in train)
        reader.report(f"the tasks differ ({told}): the whole is measured by its loss, and each file by its own task")
    if len({one.task for one in alike}) > 1:
        task = Task("text")
        reader.report(f"files that are asked like `{first.opened.source}` have other tasks: `predict` writes answers")
    if len(alike) < len(train):
        reader.report(
            f"forms differ: `predict` asks as `{first.opened.source}` does, and rows in the form of another file as "
            "that one does"
        )
    prompt_format = replace(first.loading.prompt_format, task=task)
    if prompt_format.kind == "chat" and not prompt_format.system_prompt:
        common = {common_system_prompt(one.sequences.examples[at] for at in range(len(one.sequences))) for one in alike}
        prompt_format = replace(prompt_format, system_prompt=common.pop() if len(common) == 1 else "")
    others = tuple(one.prompt_format for one in train) if len(train) > 1 else ()
    return replace(prompt_format, others=others)


def _parts(splits: Sequence[_Split]) -> tuple[Part, ...]:
    names = [one.opened.name for one in splits]
    return tuple(
        Part(name, one.opened.source, one.sequences, one.prompt_format, one.key)
        for name, one in zip(names, splits, strict=True)
    )
