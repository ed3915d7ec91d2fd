"""Data for a run: find it, decide how it becomes text, tokenize it once, and tell what came of it.

Memory stays bounded whatever the size of a file: rows pass in blocks, and the arrays are mapped from disk.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trietune.config.settings import Settings
from trietune.data import several
from trietune.data.cache import make_key
from trietune.data.counts import DataCounts
from trietune.data.encoder import hash_tokenizer
from trietune.data.examples import TokenSequences
from trietune.data.folders import SplitRole
from trietune.data.forms import Reader, open_to_train
from trietune.data.held_out import describe_held_out, draw_held_out, report_shared_rows, rows_of_split
from trietune.data.loaded_data import Data
from trietune.data.loading import CheckStop, Progress, Report, Watch, writable
from trietune.data.parts import Part
from trietune.data.prompt_formats import make_prompt_format
from trietune.data.reading import find_row_format, first_conversations, in_words_of
from trietune.data.several import load_several
from trietune.data.sources import Sources, find_sources, is_several
from trietune.data.system_prompt import common_system_prompt
from trietune.data.task import decide_task, find_task
from trietune.data.templates import PromptFormat
from trietune.demo.locations import DEMO_QUESTIONS, DEMO_REVIEWS
from trietune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEMO_DATA = (DEMO_REVIEWS, DEMO_QUESTIONS)


def load_data(
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
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
    reader = Reader(tokenizer, writable(cache_folder, report), report, progress, check_stop)
    if is_several(settings):
        return load_several(settings, reader)
    sources = find_sources(settings, report=report)
    loading = open_to_train(settings, sources, reader, watch=Watch.of(sources))
    row_format, prompt_format = loading.row_format, loading.prompt_format
    if not settings.do_validation:
        sources = replace(sources, validation=None)
    has_own = sources.validation is not None or not settings.do_validation
    held_out = None if has_own else draw_held_out(sources.train.count())
    if held_out is not None:
        report(describe_held_out(sources.train, held_out))
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
        report_shared_rows(train, validation, report)
    task = decide_task(settings, row_format, train_counts, validation_counts, report)
    system_prompt = prompt_format.system_prompt
    if prompt_format.kind == "chat" and not system_prompt:
        system_prompt = common_system_prompt(train.examples[index] for index in range(len(train.examples)))
    return Data(
        train=train,
        validation=validation,
        task=task,
        prompt_format=replace(prompt_format, task=task, system_prompt=system_prompt),
        fingerprint=make_key(train=train_key, validation=validation_key),
        train_fingerprint=train_key,
        validation_fingerprint=validation_key,
        counts=DataCounts(train_counts, validation_counts, held_out=held_out is not None),
        source_name=_name_of_source(settings, sources),
        trained_on=() if sources.train.hub_id is None else (sources.train.hub_id,),
        measured_on=validation_rows.hub_id if validation_rows is not None else None,
    )


def load_split(
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
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
    reader = Reader(tokenizer, writable(cache_folder, report), report, progress, check_stop)
    part = _read_split(settings, split, reader, prompt_format)
    return part.sequences, part.prompt_format


def load_parts(
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    split: SplitRole | None,
    *,
    prompt_format: PromptFormat | None = None,
    cache_folder: Path,
    report: Report,
    progress: Progress,
    check_stop: CheckStop,
) -> tuple[Part, ...]:
    """As `load_split`, of one data set or of each of several."""
    reader = Reader(tokenizer, writable(cache_folder, report), report, progress, check_stop)
    if is_several(settings):
        return several.load_parts(settings, split, reader, prompt_format)
    return (_read_split(settings, split, reader, prompt_format),)


def _read_split(
    settings: Settings, split: SplitRole | None, reader: Reader, prompt_format: PromptFormat | None
) -> Part:
    report, tokenizer = reader.report, reader.tokenizer
    sources = find_sources(settings, report=report)
    watch = Watch.of(sources)
    if prompt_format is not None and prompt_format.others:
        prompt_format = _of_others(settings, tokenizer, sources, prompt_format)
    row_format, form = find_row_format(settings, sources, prompt_format)
    used_format = prompt_format or make_prompt_format(
        settings, tokenizer, row_format, first_conversations(sources.train, row_format)
    )
    if prompt_format is not None:
        row_format = in_words_of(prompt_format, row_format, sources.train.name)
        if prompt_format.tokenizer_hash != hash_tokenizer(tokenizer):
            report("the tokenizer is not the one that the adapter was trained with: figures may be worse for it")
    loading = reader.loading(settings, row_format, form, None, used_format, watch)
    rows, held_out = rows_of_split(sources, split, report)
    is_rest = split == "train" and held_out is not None
    sequences, counts, key = loading.load(rows, is_training=False, held_out=held_out, is_rest=is_rest)
    is_asked = prompt_format is None or settings.task not in ("auto", used_format.task.kind)
    if is_asked and not settings.learns_preferences:
        used_format = replace(used_format, task=find_task(settings.task, row_format.kind, counts, None, report))
    return Part("", "", sequences, used_format, key)


def _of_others(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, sources: Sources, prompt_format: PromptFormat
) -> PromptFormat:
    """Of an adapter of several forms, the one of this data; the first where it is none of them."""
    with contextlib.suppress(UserError):
        row_format, _ = find_row_format(settings, sources)
        own = make_prompt_format(settings, tokenizer, row_format, first_conversations(sources.train, row_format))
        if (found := several.find_format(prompt_format.others, own, sources.train.name)) is not None:
            return replace(found, source="")
    return replace(prompt_format, others=())


def _name_of_source(settings: Settings, sources: Sources) -> str:
    known = sources.train.hub_id or (settings.dataset_id if settings.dataset_id in DEMO_DATA else None)
    return str(known or sources.train.name) if settings.train_file is None else sources.train.name
