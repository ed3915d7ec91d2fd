"""Where the data of a run lies: its training rows, its validation rows, and what task they are.

dataset_id: stanfordnlp/sst2                    the hub, official splits
dataset_id: my/folder                           train.*, and valid.*, validation.* or dev.* in it
train_file: a.jsonl, validation_file: b.jsonl   local files; `dataset_id` then only names the task
train_file: [a.jsonl, b.csv]                    several, each of these by itself
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trietune.config.settings import Settings
from trietune.data.columns import TaskName
from trietune.data.files import is_data_file
from trietune.data.folders import find_split, local_splits, no_such_path
from trietune.data.hub import find_task, is_hub_id, load_from_hub, suggest_alias
from trietune.data.opening import FileOptions
from trietune.data.rows import HubRows, Rows, SlicedRows
from trietune.demo.locations import (
    DEMO_PREFERENCES,
    DEMO_QUESTIONS,
    DEMO_REVIEWS,
    demo_preferences,
    demo_questions,
    demo_reviews,
)
from trietune.errors import UserError
from trietune.io.places import expand

_SLICE = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<start>\d+%?)?:(?P<stop>\d+%?)?\])?")


@dataclass(frozen=True, slots=True)
class Sources:
    """`validation` is None where the data has none: then a part of the training rows is held out.

    `is_task_certain` is false where `task_name` may be an old default that was not set.
    """

    train: Rows
    validation: Rows | None
    test: Rows | None
    task_name: TaskName | None
    is_task_certain: bool = True


def find_sources(settings: Settings, *, report: Callable[[str], None]) -> Sources:
    """Resolve `dataset_id`, `train_file`, `validation_file` and `dataset_split`.

    Args:
        report: takes a line for the user.

    One of each is named, see `settings_of_each`.

    Raises:
        UserError: nothing is there, several things could be meant, or the hub does not give it.
    """
    task_name = find_task("" if settings.dataset_id is None else _one(settings.dataset_id))
    split = settings.dataset_split or "train"
    options = file_options(settings)
    if settings.train_file:
        splits = local_splits(_one(settings.train_file), "train_file", report, options)
        found = _from_splits(splits, task_name, split, f"`{settings.train_file}`")
        found = replace(found, is_task_certain=not _is_of_a_run(settings.where("dataset_id")))
    elif settings.dataset_id is not None:
        found = _from_dataset_id(_one(settings.dataset_id), task_name, split, report, options)
    else:
        raise UserError(
            "no data is named", where="`train_file` and `dataset_id` are empty", next_step="train_file: data.jsonl"
        )
    if settings.validation_file:
        found = replace(found, validation=_validation_rows(_one(settings.validation_file), report, options))
    return found


def check_local(settings: Settings) -> None:
    """Look for the files that the settings name, and read none of them: before a model is fetched or converted.

    Raises:
        UserError: one is not there.
    """
    for key in ("train_file", "validation_file"):
        named = getattr(settings, key)
        for one in named if isinstance(named, tuple) else () if named is None else (named,):
            local_splits(one, key, lambda line: None, file_options(settings))
    sets = settings.dataset_id
    for one in sets if isinstance(sets, tuple) else () if sets is None or settings.train_file else (sets,):
        path = expand(one)
        is_there = path.exists() or glob.has_magic(one) or expand(one.rpartition(":")[0] or one).exists()
        if not is_there and _looks_like_a_path(one):
            raise no_such_path(path, "dataset_id")


def _looks_like_a_path(dataset_id: str) -> bool:
    return is_data_file(expand(dataset_id)) or dataset_id.startswith((".", "/", "~"))


def is_several(settings: Settings) -> bool:
    """Whether data is to be joined of several files or data sets, or has a share of its own."""
    named = (settings.train_file, settings.dataset_id, settings.validation_file)
    return settings.data_shares is not None or any(isinstance(one, tuple) for one in named)


def settings_of_each(settings: Settings) -> tuple[Settings, ...]:
    """The settings for each of several training data sets by itself, in their order; without validation files."""
    key = "dataset_id" if settings.train_file is None else "train_file"
    named = getattr(settings, key)
    alone = {"validation_file": None, "data_shares": None}
    several = named if isinstance(named, tuple) else (named,)
    return tuple(settings.model_copy(update={**alone, key: one}) for one in several)


def find_validation(settings: Settings, *, report: Callable[[str], None]) -> tuple[Sources, ...]:
    """Each of the validation files by itself, as data whose rows are those to measure; empty if none is named."""
    named = settings.validation_file
    several = named if isinstance(named, tuple) else () if named is None else (named,)
    task_name = find_task(settings.dataset_id) if isinstance(settings.dataset_id, str) else None
    options = file_options(settings)
    return tuple(
        Sources(_validation_rows(one, report, options), None, None, task_name, is_task_certain=False) for one in several
    )


def _validation_rows(path: str, report: Callable[[str], None], options: FileOptions) -> Rows:
    splits = local_splits(path, "validation_file", report, options)
    return splits[find_split(splits, "validation") or "train"]


def _one(value: str | tuple[str, ...] | None) -> str:
    """The one file or data set that is named; several are told apart before, see `settings_of_each`."""
    assert isinstance(value, str)
    return value


def file_options(settings: Settings) -> FileOptions:
    """What the settings say of files that do not say it themselves."""
    return FileOptions(settings.file_encoding, settings.csv_separator, settings.txt_unit)


def _is_of_a_run(origin: str) -> bool:
    """Whether a value stands in the `config.yaml` of a run: until 0.1.0, those named SST-2 beside any `train_file`."""
    path = Path(origin.rpartition(", line ")[0])
    return path.name == "config.yaml" and (path.parent / ".run-id").is_file()


def _from_dataset_id(
    dataset_id: str, task_name: TaskName | None, split: str, report: Callable[[str], None], options: FileOptions
) -> Sources:
    demo = {DEMO_REVIEWS: demo_reviews, DEMO_QUESTIONS: demo_questions, DEMO_PREFERENCES: demo_preferences}.get(
        dataset_id
    )
    path = demo() if demo else expand(dataset_id)
    is_configured = ":" in dataset_id and expand(dataset_id.rpartition(":")[0]).is_dir()
    if path.exists() or glob.has_magic(dataset_id) or is_configured:
        splits = local_splits(str(path), "dataset_id", report, options)
        return _from_splits(splits, task_name, split, f"`{dataset_id}`")
    if _looks_like_a_path(dataset_id) or not is_hub_id(dataset_id):
        raise no_such_path(path, "dataset_id")
    if "/" not in dataset_id and task_name is None and (near := suggest_alias(dataset_id)):
        raise UserError(
            f"there is no data set `{dataset_id}`",
            where=f"dataset_id: {dataset_id}",
            next_step=f"did you mean `{near}`?",
        )
    hub_splits, name = load_from_hub(dataset_id, report=report)
    return _from_splits(
        {key: HubRows(rows, name, key) for key, rows in hub_splits.items()}, task_name, split, f"`{name}`"
    )


def _from_splits(splits: Mapping[str, Rows], task_name: TaskName | None, split: str, source: str) -> Sources:
    request = _parse_split(split)
    train_name = request["name"]
    if train_name not in splits:
        train_name = find_split(splits, "train") if train_name == "train" else None
    if train_name is None:
        raise UserError(
            f"{source} has no split `{request['name']}`",
            where=f"it has {', '.join(f'`{name}`' for name in splits) or 'none'}",
            next_step=f"dataset_split: {next(iter(splits), 'train')}     (the split to train on)",
        )
    validation = find_split(splits, "validation")
    test = find_split(splits, "test")
    return Sources(
        train=_select(splits[train_name], request),
        validation=splits[validation] if validation and validation != train_name else None,
        test=splits[test] if test and test != train_name else None,
        task_name=task_name,
    )


def _parse_split(split: str) -> dict[str, str | None]:
    match = _SLICE.fullmatch(split.strip())
    if match is None:
        raise UserError(
            f"`dataset_split: {split}` is not a split",
            next_step="write a name, or a part of one: `train`, `train[:1000]`, `train[10%:20%]`",
        )
    return match.groupdict()


def _select(rows: Rows, request: Mapping[str, str | None]) -> Rows:
    start, stop = request["start"], request["stop"]
    if start is None and stop is None:
        return rows
    count = rows.count()

    def position(bound: str | None, default: int) -> int:
        if bound is None:
            return default
        value = count * int(bound[:-1]) // 100 if bound.endswith("%") else int(bound)
        return min(value, count)

    first, last = position(start, 0), position(stop, count)
    if first >= last:
        raise UserError(
            f"`dataset_split: {request['name']}[{start or ''}:{stop or ''}]` holds no rows",
            where=f"{rows.name} has {count:,}",
            next_step="write a range that lies inside it",
        )
    return SlicedRows(rows, first, last)
