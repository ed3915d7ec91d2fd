"""Data for a run: find it, decide how it becomes text, tokenize it once, and tell what came of it.

Memory stays bounded whatever the size of a file: rows pass in blocks, and the arrays are mapped from disk.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import compress, islice
from pathlib import Path
from typing import Any

import numpy as np

from trietune.config.settings import Settings
from trietune.data.cache import CacheWriter, make_key, open_cached
from trietune.data.columns import (
    REQUIRED_COLUMNS,
    RowFormat,
    built_in_row_format,
    choose_row_format,
    find_built_in,
    find_form,
    find_unused,
    is_squad_row,
    row_format_of_adapter,
)
from trietune.data.counts import SAMPLES_KEPT, DataCounts, SplitCounts, describe, name_places
from trietune.data.encode_answers import tokenize_answers
from trietune.data.encode_rows import COMPLETIONS_TALLIED, LengthRules, tokenize_rows
from trietune.data.encoder import hash_tokenizer, make_encoder
from trietune.data.examples import IGNORED_LABEL, Message, Task, TokenSequences
from trietune.data.files import BrokenRow, detect_format
from trietune.data.preferences import AnswerForm, choose_form
from trietune.data.prompt_formats import make_prompt_format
from trietune.data.sources import FileRows, Rows, Sources, SplitRole, find_sources
from trietune.data.templates import PromptFormat, find_columns, read_messages, split_template
from trietune.data.weights import COLUMN, Weighting, find_weighting
from trietune.demo.locations import DEMO_QUESTIONS, DEMO_REVIEWS
from trietune.errors import StopRequested, UserError

Report = Callable[[str], None]
Progress = Callable[[str, int, int | None], None]
CheckStop = Callable[[], None]

# Custom data without validation data: this part of the training rows, at least one and at most so many. The draw does
# not follow `seed`, so runs that differ in it are measured on the same examples.
HELD_OUT_SHARE = 0.05
HELD_OUT_AT_MOST = 1000
HELD_OUT_SEED = 20_230_712
# Custom data is a choice between labels if its completions are few, short, and each seen several times.
LABEL_SEEN_AT_LEAST = 3
LABEL_CHARACTERS_AT_MOST = 60
# `max_length: auto` where no model says how long a sequence may be.
UNBOUNDED = 2**31 - 1
# Which rows are accepted, and how: an entry of the cache that was made by other rules is not used.
READING_VERSION = 2
DEMO_DATA = (DEMO_REVIEWS, DEMO_QUESTIONS)


@dataclass(frozen=True, slots=True)
class Data:
    """All that a run needs of its data.

    Attributes:
        validation: None if the data is too small to hold any out.
        source_name: the training data as a person would name it, without the path to it.
        trained_on, measured_on: the hub's id of the data set that training and validation rows come from; None where
            they are files of one's own.
        fingerprint: changes whenever a token or a label of either split does; the other two tell them apart, and
            `validation_fingerprint` is empty where there is no validation data.
    """

    train: TokenSequences
    validation: TokenSequences | None
    task: Task
    prompt_format: PromptFormat
    fingerprint: str
    train_fingerprint: str
    validation_fingerprint: str
    counts: DataCounts
    source_name: str = ""
    trained_on: str | None = None
    measured_on: str | None = None


def load_data(
    settings: Settings,
    tokenizer: Any,
    *,
    cache_folder: Path,
    report: Report,
    progress: Progress,
    check_stop: CheckStop,
) -> Data:
    """The training and validation data that the settings name, as token sequences.

    Args:
        tokenizer: a fast `transformers` tokenizer, see `load_tokenizer`.
        report: takes a line for the user.
        progress: called after each block with phase, rows done, and rows in all (None if unknown).
        check_stop: called before each block; whatever it raises passes through, and nothing half-written stays.

    Raises:
        UserError: the data cannot be found or read, has broken rows or wrong labels, or nothing of it is left.
    """
    sources = find_sources(settings, report=report)
    watch = _Watch.of(sources)
    row_format, form = _find_row_format(settings, sources)
    prompt_format = make_prompt_format(
        settings, tokenizer, row_format, _first_conversation(sources.train, row_format), check_stop
    )
    weighting = _find_weighting(settings, sources, row_format, report)
    unused = find_unused(sources.train.columns(), row_format)
    if weighting is not None and weighting.has_column:
        unused = tuple(name for name in unused if name != COLUMN)
    if unused and (sources.task_name is None or settings.train_file):
        shown = ", ".join(f"`{name}`" for name in unused[:20]) + (
            f" and {len(unused) - 20:,} more" if unused[20:] else ""
        )
        report(f"columns of `{sources.train.name}` that nothing uses: {shown}")
    if row_format.kind == "templates" and not find_columns(row_format.prompt_template, row_format.template_columns):
        report("`prompt_template` names no column: all prompts are the same text")
    loading = _Loading(
        settings,
        tokenizer,
        row_format,
        form,
        weighting,
        prompt_format,
        _writable(cache_folder, report),
        report,
        progress,
        check_stop,
        watch,
    )
    held_out = None if sources.validation is not None else draw_held_out(sources.train.count())
    if held_out is not None:
        report(_describe_held_out(sources.train, held_out))
    train, train_counts, train_key = loading.load(
        sources.train, is_training=True, held_out=held_out, limit=settings.max_train_examples
    )
    validation, validation_counts, validation_key = None, None, ""
    validation_rows = sources.validation or (sources.train if held_out is not None and held_out.any() else None)
    if validation_rows is not None:
        validation, validation_counts, validation_key = loading.load(
            validation_rows, is_training=False, held_out=held_out
        )
    if validation is not None:
        _report_shared_rows(train, validation, report)
    task = row_format.task
    if row_format.kind in ("templates", "columns"):
        task = find_label_task(train_counts, validation_counts)
    if task.kind == "labels" and task != row_format.task:
        report(
            f"completions take {len(task.labels)} values ({', '.join(task.label_names)}): accuracy is measured on them"
        )
    return Data(
        train=train,
        validation=validation,
        task=task,
        prompt_format=replace(prompt_format, task=task),
        fingerprint=make_key(train=train_key, validation=validation_key),
        train_fingerprint=train_key,
        validation_fingerprint=validation_key,
        counts=DataCounts(train_counts, validation_counts, held_out=held_out is not None),
        source_name=_name_of_source(settings, sources),
        trained_on=sources.train.hub_id,
        measured_on=validation_rows.hub_id if validation_rows is not None else None,
    )


def load_split(
    settings: Settings,
    tokenizer: Any,
    split: SplitRole | None,
    *,
    prompt_format: PromptFormat | None = None,
    cache_folder: Path,
    report: Report,
    progress: Progress,
    check_stop: CheckStop,
) -> tuple[TokenSequences, PromptFormat]:
    """One split to evaluate on, with nothing left out; in the prompt format of an adapter, if one is given.

    Args:
        split: split as a run would split the data; None takes the data's own validation split, and every row where it
            has none.

    Raises:
        UserError: as `load_data`; or the data has no such split.
    """
    sources = find_sources(settings, report=report)
    watch = _Watch.of(sources)
    row_format, form = _find_row_format(settings, sources, prompt_format)
    used_format = prompt_format or make_prompt_format(
        settings, tokenizer, row_format, _first_conversation(sources.train, row_format)
    )
    if prompt_format is not None:
        row_format = _in_words_of(prompt_format, row_format, sources.train.name)
        if prompt_format.tokenizer_hash != hash_tokenizer(tokenizer):
            report("the tokenizer is not the one that the adapter was trained with: figures may be worse for it")
    loading = _Loading(
        settings,
        tokenizer,
        row_format,
        form,
        None,
        used_format,
        _writable(cache_folder, report),
        report,
        progress,
        check_stop,
        watch,
    )
    rows, held_out = _rows_of_split(sources, split, report)
    is_rest = split == "train" and held_out is not None
    sequences, counts, _ = loading.load(rows, is_training=False, held_out=held_out, is_rest=is_rest)
    if prompt_format is None and row_format.kind in ("templates", "columns"):
        used_format = replace(used_format, task=find_label_task(counts, None))
    return sequences, used_format


def _rows_of_split(sources: Sources, split: SplitRole | None, report: Report) -> tuple[Rows, np.ndarray | None]:
    """The rows to measure, and which of them; None takes all."""
    train = sources.train
    if split is None and sources.validation is None:
        report(f"`{train.name}` has no validation split of its own: every row is measured")
        return train, None
    rows = {"train": train, "validation": sources.validation, "test": sources.test}[split or "validation"]
    held_out = None
    if split in ("train", "validation") and sources.validation is None:
        held_out = draw_held_out(train.count())
        report(_describe_held_out(train, held_out))
        rows = train if split == "train" or held_out.any() else None
    if rows is None:
        raise UserError(
            f"`{train.name}` comes without a {split} split",
            next_step="name a file with examples that were not trained on: `validation_file: ...`",
        )
    return rows, ~held_out if split == "train" and held_out is not None else held_out


def draw_held_out(num_rows: int) -> np.ndarray:
    """Which rows are held out of the training data; bool [rows], the same for the same number of rows."""
    number = 0 if num_rows < 2 else min(HELD_OUT_AT_MOST, max(1, round(num_rows * HELD_OUT_SHARE)))
    is_held_out = np.zeros(num_rows, bool)
    is_held_out[np.random.default_rng(HELD_OUT_SEED).choice(num_rows, number, replace=False)] = True
    return is_held_out


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


@dataclass(frozen=True, slots=True)
class _Watch:
    """The files of all splits as they were before the first look into any: columns, counts and rows are of one time.

    A key is made before rows are read, so what is read later must be what the key was made of.
    """

    rows: tuple[Rows, ...]
    stamps: tuple[tuple[tuple[int, ...], ...], ...]

    @classmethod
    def of(cls, sources: Sources) -> _Watch:
        rows = tuple(rows for rows in (sources.train, sources.validation, sources.test) if rows is not None)
        return cls(rows, tuple(one.stamp() for one in rows))

    def check(self) -> None:
        """Raise `UserError` if a file was written to since."""
        for rows, stamp in zip(self.rows, self.stamps, strict=True):
            if rows.stamp() != stamp:
                raise _changed_meanwhile(rows)


@dataclass(frozen=True, slots=True)
class _Loading:
    """What the splits of one call share."""

    settings: Settings
    tokenizer: Any
    row_format: RowFormat
    form: AnswerForm | None
    weighting: Weighting | None
    prompt_format: PromptFormat
    cache_folder: Path
    report: Report
    progress: Progress
    check_stop: CheckStop
    watch: _Watch

    def load(
        self,
        rows: Rows,
        *,
        is_training: bool,
        held_out: np.ndarray | None,
        limit: int | None = None,
        is_rest: bool = False,
    ) -> tuple[TokenSequences, SplitCounts, str]:
        """A split from the cache, or made now; its counts; its key.

        Args:
            held_out: bool [rows]; training leaves these out, everything else takes only these.
            is_rest: whether `held_out` holds the rows that training takes, to be measured.
        """
        self.check_stop()
        # Evaluation measures every label alike.
        weighting = self.weighting if is_training else None
        rules = LengthRules(
            max_length=UNBOUNDED if self.settings.max_length == "auto" else self.settings.max_length,
            overlong=self.settings.overlong if is_training else None,
            keeps_empty=not is_training,
            ignored_label=self.settings.ignored_index if self.row_format.kind == "tokens" else IGNORED_LABEL,
        )
        fingerprint = rows.fingerprint()
        key = make_key(
            rows=fingerprint,
            recipe=_deciding_fields(self.row_format),
            prompt_format=_deciding_fields(self.prompt_format),
            rules=asdict(rules),
            tokenizers=metadata.version("tokenizers"),
            held_out=None if held_out is None else [HELD_OUT_SEED, int(held_out.sum()), is_training or is_rest],
            **({"is_rest": True} if is_rest else {}),
            limit=limit,
            **({} if self.form is None else {"answers": asdict(self.form)}),
            **({} if weighting is None else {"weights": asdict(weighting)}),
        )
        entry = make_key(fingerprint=key, reading_version=READING_VERSION)
        found = open_cached(self.cache_folder, entry)
        if found is None:
            sequences, counts = self._tokenize(rows, fingerprint, rules, entry, is_training, held_out, limit, weighting)
        else:
            self.watch.check()
            sequences, counts = found[0], SplitCounts.from_dict(found[1])
        for line in describe(counts, is_training=is_training, max_length=rules.max_length):
            self.report(line)
        if not len(sequences):
            raise _nothing_left(counts, rules.max_length)
        # Checkpoints of the first version name data by `key` alone, and such rows gave other sequences then.
        if counts.without_labels.number or counts.padded.number:
            key = make_key(fingerprint=key, reading_version=READING_VERSION)
        return sequences, counts, key

    def _tokenize(
        self,
        rows: Rows,
        fingerprint: str,
        rules: LengthRules,
        key: str,
        is_training: bool,
        held_out: np.ndarray | None,
        limit: int | None,
        weighting: Weighting | None,
    ) -> tuple[TokenSequences, SplitCounts]:
        total = rows.quick_count() if held_out is None else int((held_out != is_training).sum())
        total = limit if total is None else min(total, limit or total)
        phase = f"tokenizing {'training' if is_training else 'validation'} data"
        placed = rows.read()
        if held_out is not None and not is_training:
            placed = compress(placed, held_out)
        common: dict[str, Any] = {
            "source": rows.name,
            "encoder": make_encoder(self.tokenizer, self.prompt_format, check_stop=self.check_stop),
            "rules": rules,
            "check_stop": self.check_stop,
            "progress": lambda done: self.progress(phase, done, total),
            "left_out": held_out if is_training else None,
        }
        placed = islice(placed, _last_row(held_out, limit))
        with CacheWriter(self.cache_folder, key) as writer:
            try:
                if self.form is None:
                    counts = tokenize_rows(placed, writer, row_format=self.row_format, weighting=weighting, **common)
                else:
                    counts = tokenize_answers(placed, writer, form=self.form, **common)
            except StopRequested:
                raise
            except Exception:
                self.watch.check()  # what is wrong with the rows may be that they are half written
                raise
            self.watch.check()
            if rows.fingerprint() != fingerprint:
                raise _changed_meanwhile(rows)
            return writer.finish(asdict(counts)), counts


def _first_conversation(rows: Rows, row_format: RowFormat) -> tuple[Message, ...]:
    """The first conversation up to its first answer; empty where there is none that can be read."""
    _, row = next(rows.read(), ("", None)) if row_format.kind == "messages" else ("", None)
    try:
        messages = read_messages(row["messages"]) if isinstance(row, dict) else ()
    except (KeyError, TypeError):
        return ()
    end = next((index for index, one in enumerate(messages) if one.role == "assistant" and index), None)
    return messages[: end + 1] if end is not None else ()


def _report_shared_rows(train: TokenSequences, validation: TokenSequences, report: Report) -> None:
    """Say how many validation examples stand in the training data, too: their figures are memory, not skill."""
    keys = [_sums(sequences) for sequences in (train, validation)]
    candidates = np.flatnonzero(np.isin(keys[0], keys[1]))
    seen = {_ids_of(train, int(index)) for index in candidates}
    shared = [index for index in range(len(validation)) if _ids_of(validation, index) in seen]
    if shared:
        places = name_places([validation.ids[index] for index in shared[:SAMPLES_KEPT]], len(shared))
        report(
            f"validation: {len(shared):,} of {len(validation):,} examples also stand in the training data ({places})"
        )


def _sums(sequences: TokenSequences) -> np.ndarray:
    """A number of each sequence that equal ones share; int64 [examples]."""
    offsets = np.asarray(sequences.offsets)
    ids = np.asarray(sequences.input_ids, np.int64)
    totals = np.concatenate([[0], np.cumsum(ids * ids % 1_000_003)])
    sums: np.ndarray = (totals[offsets[1:]] - totals[offsets[:-1]]) * 65_537 + np.diff(offsets)
    return sums


def _ids_of(sequences: TokenSequences, index: int) -> bytes:
    return np.asarray(sequences.input_ids[sequences.offsets[index] : sequences.offsets[index + 1]]).tobytes()


def _is_in_squads_form(rows: Rows, first: Any) -> bool:
    is_squad_file = isinstance(rows, FileRows) and all(detect_format(path) == "squad" for path in rows.paths)
    has_columns = isinstance(first, dict) and set(REQUIRED_COLUMNS["squad"]) <= set(first)
    return has_columns and find_form(first) is None and (is_squad_file or is_squad_row(first))


def _deciding_fields(words: RowFormat | PromptFormat) -> dict[str, Any]:
    """What of a row format or prompt format decides tokens.

    Names of columns do only where templates mean others than they meant when identifiers alone were columns; a
    checkpoint of that time then goes on with the same fingerprint.
    """
    fields = asdict(words)
    columns = fields.pop("template_columns")
    templates = (words.prompt_template, words.completion_template)
    if all(split_template(one, columns) == split_template(one) for one in templates):
        return fields
    return {**fields, "template_columns": [find_columns(one, columns) for one in templates]}


def _in_words_of(prompt_format: PromptFormat, row_format: RowFormat, source: str) -> RowFormat:
    """The row format for the same rows in the words of an adapter's prompt format."""
    kinds = {"messages": "chat", "answer_messages": "chat", "tokens": "tokens"}
    kind = kinds.get(row_format.kind, "template")
    if kind != prompt_format.kind:
        in_words = {"chat": "conversations", "tokens": "tokens that the data brought", "template": "prompts"}
        raise UserError(
            f"the adapter was trained on {in_words[prompt_format.kind]}, and `{source}` holds {in_words[kind]}",
            next_step="evaluate it on data in the form that it was trained on",
        )
    return replace(
        row_format,
        prompt_template=prompt_format.prompt_template,
        completion_template=prompt_format.completion_template,
        template_columns=prompt_format.template_columns,
    )


def _find_row_format(
    settings: Settings, sources: Sources, trained_with: PromptFormat | None = None
) -> tuple[RowFormat, AnswerForm | None]:
    """How rows become examples, and, where preferences are learnt, how they become answers that are compared.

    What an adapter was trained with says more about the rows than their columns.
    """
    rows = sources.train
    columns = rows.columns()
    task_name = sources.task_name
    if trained_with is not None and trained_with.kind == "template":
        own_task = find_built_in(trained_with)
        if own_task and set(REQUIRED_COLUMNS[own_task]) <= set(columns):
            return built_in_row_format(own_task), None
        if trained_with.completion_template:
            return row_format_of_adapter(trained_with, columns, rows.name), None
    if task_name and not sources.is_task_certain and not set(REQUIRED_COLUMNS[task_name]) <= set(columns):
        task_name = None
    place, row = next(rows.read(), ("", None))
    if not columns:
        raise UserError(
            f"`{rows.name}` holds no rows" if row is None else f"no row of `{rows.name}` can be read",
            where=None if row is None else f"{place}: {getattr(row, 'reason', 'no columns')}",
            next_step="check that the file is the one that you mean",
        )
    if settings.learns_preferences:
        form = choose_form(
            columns,
            _first_row(rows),
            objective=settings.objective,
            prompt_template=settings.prompt_template,
            source=rows.name,
        )
        return RowFormat("answer_messages" if form.is_chat else "answers", settings.prompt_template or ""), form
    if task_name is None and settings.prompt_template is None and _is_in_squads_form(rows, row):
        task_name = "squad"
    row_format = choose_row_format(
        columns,
        task_name=task_name,
        prompt_template=settings.prompt_template,
        completion_template=settings.completion_template,
        source=rows.name,
    )
    if row_format.kind == "columns" and isinstance(_first_row(rows).get("label"), bool):
        raise UserError(
            f"`label` of `{rows.name}` says which completions are wanted, and `objective: sft` would learn all of them",
            where=f"its columns are {', '.join(f'`{name}`' for name in columns)}",
            next_step="objective: kto     (or remove the column `label`)",
        )
    return row_format, None


def _find_weighting(
    settings: Settings, sources: Sources, row_format: RowFormat, report: Callable[[str], None]
) -> Weighting | None:
    if settings.objective == "sft":
        return find_weighting(sources.train, row_format)
    if COLUMN in sources.train.columns():
        report(f"the column `{COLUMN}` is not used: `objective: {settings.objective}` has no weights of examples")
    return None


def _first_row(rows: Rows) -> Mapping[str, Any]:
    return next((row for _, row in rows.read() if not isinstance(row, BrokenRow)), {})


def _name_of_source(settings: Settings, sources: Sources) -> str:
    known = sources.train.hub_id or (settings.dataset_id if settings.dataset_id in DEMO_DATA else None)
    return str(known or sources.train.name) if settings.train_file is None else sources.train.name


def _last_row(held_out: np.ndarray | None, limit: int | None) -> int | None:
    """How many rows hold the first `limit` that are not held out."""
    if held_out is None or limit is None:
        return limit
    taken = np.flatnonzero(~held_out)
    return int(taken[limit - 1]) + 1 if limit <= len(taken) else None


def _describe_held_out(rows: Rows, held_out: np.ndarray) -> str:
    number = int(held_out.sum())
    if not number:
        return f"`{rows.name}` is too small to hold validation examples out: nothing will be validated"
    return (
        f"no validation data: {number:,} of {len(held_out):,} rows of `{rows.name}` are held out for it, "
        "the same ones in every run"
    )


def _changed_meanwhile(rows: Rows) -> UserError:
    return UserError(
        f"`{rows.name}` was written to while it was read, so nobody can tell what was read of it",
        where="nothing was kept",
        next_step="wait until the file is complete, then run the same command again",
    )


def _nothing_left(counts: SplitCounts, max_length: int) -> UserError:
    if counts.overlong.number:
        return UserError(
            f"all {counts.read:,} examples of `{counts.source}` are longer than `max_length: {max_length}`",
            where=name_places(counts.overlong.samples, counts.overlong.number),
            next_step="raise `max_length`, or write `overlong: truncate_prompt`",
        )
    if counts.without_weight.number:
        return UserError(
            f"none of the {counts.read:,} rows of `{counts.source}` can be learned from: their weights are 0",
            where=name_places(counts.without_weight.samples, counts.without_weight.number),
            next_step="check the column `weight`, or the key `weight` of its messages",
        )
    if counts.without_pair.number:
        return UserError(
            f"none of the {counts.read:,} rows of `{counts.source}` prefers one answer to another: `chosen` and "
            "`rejected` are equal",
            where=name_places(counts.without_pair.samples, counts.without_pair.number),
            next_step="check the column `rejected` (or `scores`, `ranking`) of the file",
        )
    if counts.without_labels.number:
        return UserError(
            f"none of the {counts.read:,} rows of `{counts.source}` has a label, so there is nothing to learn",
            where=name_places(counts.without_labels.samples, counts.without_labels.number),
            next_step="check `labels` (and `ignored_index`) of the data",
        )
    return UserError(
        f"none of the {counts.read:,} rows of `{counts.source}` can be learnt from: their completions are empty",
        where=name_places(counts.without_completion.samples, counts.without_completion.number),
        next_step="check `completion_template` and the columns of the file",
    )


def _writable(cache_folder: Path, report: Report) -> Path:
    """The cache folder; if nothing can be written there, a temporary one that lasts as long as the process."""
    try:
        (cache_folder / "tokens").mkdir(parents=True, exist_ok=True)
        # An entry is a folder that gets its name when it is whole; not every file system renames folders.
        with tempfile.TemporaryDirectory(dir=cache_folder / "tokens", prefix=".trying-") as tried:
            (Path(tried) / "building").mkdir()
            (Path(tried) / "building").rename(Path(tried) / "whole")
            return cache_folder
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="trietune-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        report(f"the cache folder {cache_folder} cannot be written ({error.strerror}): tokens are not kept this time")
        return folder
