"""Where the data of a run lies: its training rows, its validation rows, and what task they are.

dataset_id: stanfordnlp/sst2                    the hub, official splits
dataset_id: my/folder                           train.*, and valid.*, validation.* or dev.* in it
train_file: a.jsonl, validation_file: b.jsonl   local files; `dataset_id` then only names the task
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from trietune.config.settings import Settings
from trietune.data.columns import TaskName
from trietune.data.files import FORMAT_OF_SUFFIX, FORMATS_IN_WORDS, BrokenRow, Row, count_rows, detect_format, read_rows
from trietune.data.hub import find_task, is_hub_id, load_from_hub, suggest_alias
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

SplitRole = Literal["train", "validation", "test"]
PlacedRow = tuple[str, Row | BrokenRow]

_SPLIT_NAMES: dict[SplitRole, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
# `-00000-of-00002`, with the hub's hash behind it or not; `_1`; `.part3`.
_SHARD = re.compile(r"([-_.]?(part|shard)?[-_.]?\d+([-_.]of[-_.]\d+)?([-_][0-9a-f]{8,})?)?", re.IGNORECASE)
_SLICE = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<start>\d+%?)?:(?P<stop>\d+%?)?\])?")


class Rows(Protocol):
    """The rows of one split, readable any number of times."""

    @property
    def name(self) -> str: ...

    @property
    def hub_id(self) -> str | None:
        """The data set of the hub that they come from, as `owner/name`; None for local files."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever the rows, their order or their places do."""
        ...

    def stamp(self) -> tuple[tuple[int, ...], ...]:
        """Changes whenever a file of these rows is written to, also if its content comes back."""
        ...

    def columns(self) -> list[str]: ...

    def count(self) -> int: ...

    def quick_count(self) -> int | None:
        """The count, where the rows need not be parsed for it."""
        ...

    def read(self) -> Iterator[PlacedRow]:
        """Each row with its place: `train.tsv:17`."""
        ...


@dataclass(frozen=True, slots=True)
class Sources:
    """`validation` is None where the data has none: then a part of the training rows is held out.

    `is_task_certain` is false where `task_name` may be an old default that nobody wrote.
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

    Raises:
        UserError: nothing is there, several things could be meant, or the hub does not give it.
    """
    task_name = find_task(settings.dataset_id or "")
    split = settings.dataset_split or "train"
    if settings.train_file:
        splits = _local_splits(settings.train_file, "train_file", report)
        found = _from_splits(splits, task_name, split, f"`{settings.train_file}`")
        found = replace(found, is_task_certain=not _is_of_a_run(settings.where("dataset_id")))
    elif settings.dataset_id is not None:
        found = _from_dataset_id(settings.dataset_id, task_name, split, report)
    else:
        raise UserError(
            "no data is named", where="`train_file` and `dataset_id` are empty", next_step="train_file: data.jsonl"
        )
    if settings.validation_file:
        splits = _local_splits(settings.validation_file, "validation_file", report)
        name = _find_split(splits, "validation") or "train"
        found = replace(found, validation=splits[name])
    return found


@dataclass(frozen=True, slots=True)
class FileRows:
    """Rows of one or more local files, one after the other."""

    paths: tuple[Path, ...]
    labels: tuple[str, ...]  # how each file is called in a place: its name, or enough of its path

    @classmethod
    def of(cls, paths: Sequence[Path]) -> FileRows:
        names = [path.name for path in paths]
        labels = names if len(set(names)) == len(names) else [str(path) for path in paths]
        return cls(tuple(paths), tuple(labels))

    @property
    def hub_id(self) -> None:
        return None

    @property
    def name(self) -> str:
        return self.labels[0] if len(self.paths) == 1 else f"{self.labels[0]} and {len(self.paths) - 1} more"

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path, label in zip(self.paths, self.labels, strict=True):
            try:
                with path.open("rb") as file:
                    digest.update(f"{label}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
            except OSError as error:
                raise UserError(f"cannot read `{path}`: {error.strerror or error}") from None
        return digest.hexdigest()

    def stamp(self) -> tuple[tuple[int, ...], ...]:
        return tuple(map(_stamp_of, self.paths))

    def columns(self) -> list[str]:
        for path in self.paths:
            for _, row in read_rows(path):
                if not isinstance(row, BrokenRow):
                    return list(row)
        return []

    def count(self) -> int:
        return sum(count_rows(path) for path in self.paths)

    def quick_count(self) -> int | None:
        forms = {detect_format(path) for path in self.paths}
        return self.count() if forms <= {"parquet", "jsonl", "tsv"} else None

    def read(self) -> Iterator[PlacedRow]:
        for path, label in zip(self.paths, self.labels, strict=True):
            between = {"squad": " question ", "parquet": " row "}.get(detect_format(path), ":")
            for number, row in read_rows(path):
                yield f"{label}{between}{number}", row


@dataclass(frozen=True, slots=True)
class HubRows:
    """Rows of one split of a `datasets` data set, memory-mapped by that library."""

    dataset: Any
    name: str
    split: str

    @property
    def hub_id(self) -> str:
        # The name may tell the configuration, too: `nyu-mll/glue (sst2)`.
        return self.name.partition(" ")[0]

    def fingerprint(self) -> str:
        # Not the library's own: that is another one offline, and after an upgrade.
        digest = hashlib.sha256(f"{self.split}\0{len(self.dataset)}\0".encode())
        for cached in self.dataset.cache_files:
            with Path(cached["filename"]).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def stamp(self) -> tuple[tuple[int, ...], ...]:
        return tuple(_stamp_of(Path(cached["filename"])) for cached in self.dataset.cache_files)

    def columns(self) -> list[str]:
        return list(self.dataset.column_names)

    def count(self) -> int:
        return len(self.dataset)

    def quick_count(self) -> int | None:
        return len(self.dataset)

    def read(self) -> Iterator[PlacedRow]:
        number = 0
        for batch in self.dataset.iter(batch_size=4096):
            for values in zip(*batch.values(), strict=True):
                yield f"{self.split}:{number}", dict(zip(batch, values, strict=True))
                number += 1


@dataclass(frozen=True, slots=True)
class SlicedRows:
    """The rows from `start` to `stop` of others."""

    rows: Rows
    start: int
    stop: int

    @property
    def hub_id(self) -> str | None:
        return self.rows.hub_id

    @property
    def name(self) -> str:
        return f"{self.rows.name}[{self.start}:{self.stop}]"

    def fingerprint(self) -> str:
        return f"{self.rows.fingerprint()}[{self.start}:{self.stop}]"

    def stamp(self) -> tuple[tuple[int, ...], ...]:
        return self.rows.stamp()

    def columns(self) -> list[str]:
        return self.rows.columns()

    def count(self) -> int:
        return self.stop - self.start

    def quick_count(self) -> int | None:
        return self.count()

    def read(self) -> Iterator[PlacedRow]:
        return islice(self.rows.read(), self.start, self.stop)


def _is_of_a_run(origin: str) -> bool:
    """Whether a value stands in the `config.yaml` of a run: until 0.1.0, those named SST-2 beside any `train_file`."""
    path = Path(origin.rpartition(", line ")[0])
    return path.name == "config.yaml" and (path.parent / ".run-id").is_file()


def _stamp_of(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"cannot read `{path}`: {error.strerror or error}") from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _from_dataset_id(dataset_id: str, task_name: TaskName | None, split: str, report: Callable[[str], None]) -> Sources:
    demo = {DEMO_REVIEWS: demo_reviews, DEMO_QUESTIONS: demo_questions, DEMO_PREFERENCES: demo_preferences}.get(
        dataset_id
    )
    path = demo() if demo else expand(dataset_id)
    if path.exists() or glob.has_magic(dataset_id):
        return _from_splits(_local_splits(str(path), "dataset_id", report), task_name, split, f"`{dataset_id}`")
    looks_like_a_path = path.suffix.lower() in FORMAT_OF_SUFFIX or dataset_id.startswith((".", "/", "~"))
    if looks_like_a_path or not is_hub_id(dataset_id):
        raise _no_such_path(path, "dataset_id")
    if "/" not in dataset_id and task_name is None and (near := suggest_alias(dataset_id)):
        raise UserError(
            f"there is no data set `{dataset_id}`",
            where=f"dataset_id: {dataset_id}",
            next_step=f"did you mean `{near}`?",
        )
    splits, name = load_from_hub(dataset_id, report=report)
    return _from_splits({key: HubRows(rows, name, key) for key, rows in splits.items()}, task_name, split, f"`{name}`")


def _from_splits(splits: Mapping[str, Rows], task_name: TaskName | None, split: str, source: str) -> Sources:
    request = _parse_split(split)
    train_name = request["name"]
    if train_name not in splits:
        train_name = _find_split(splits, "train") if train_name == "train" else None
    if train_name is None:
        raise UserError(
            f"{source} has no split `{request['name']}`",
            where=f"it has {', '.join(f'`{name}`' for name in splits) or 'none'}",
            next_step=f"dataset_split: {next(iter(splits), 'train')}     (the split to train on)",
        )
    validation = _find_split(splits, "validation")
    test = _find_split(splits, "test")
    return Sources(
        train=_select(splits[train_name], request),
        validation=splits[validation] if validation and validation != train_name else None,
        test=splits[test] if test and test != train_name else None,
        task_name=task_name,
    )


def _find_split(splits: Mapping[str, Rows], role: SplitRole) -> str | None:
    return next((name for name in _SPLIT_NAMES[role] if name in splits), None)


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


def _local_splits(value: str, key: str, report: Callable[[str], None]) -> dict[str, Rows]:
    """What a path stands for; a file, or files that a pattern finds, are one split called `train`."""
    path = expand(value)
    return _splits_of_folder(path, report) if path.is_dir() else {"train": FileRows.of(_expand(path, key))}


def _splits_of_folder(folder: Path, report: Callable[[str], None]) -> dict[str, Rows]:
    """Split names to files: `train.tsv`, shards such as `train-00000-of-00002.parquet`, or `train/anything.jsonl`."""
    # Data sets downloaded from the hub keep their files in `data`.
    roots = [folder, folder / "data"] if (folder / "data").is_dir() else [folder]
    files: dict[str, list[Path]] = {}
    similar: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for path in sorted(path for root in roots for path in root.iterdir()):
        name, is_exact = _split_of(path.stem if path.is_file() else path.name)
        if path.is_dir():
            if name and is_exact:
                files.setdefault(name, []).extend(_data_files(path))
        elif path.suffix.lower() in FORMAT_OF_SUFFIX:
            if name is None:
                unnamed.append(path)
            else:
                (files if is_exact else similar).setdefault(name, []).append(path)
    for name, paths in similar.items():
        _settle(name, paths, files, folder, report)
    for name, paths in files.items():
        suffixes = sorted({path.suffix for path in paths})
        if len(suffixes) > 1:
            raise UserError(
                f"the split `{name}` is there in several forms: {', '.join(suffixes)}",
                where=str(folder),
                next_step="name the one to take: `train_file: ...` and `validation_file: ...`",
            )
    if not files:
        if not unnamed:
            raise UserError(
                f"the folder `{folder}` holds no data files",
                where="train.*, and validation.* or dev.* are looked for",
                next_step=f"these can be read: {FORMATS_IN_WORDS}",
            )
        files["train"] = unnamed
    return {name: FileRows.of(paths) for name, paths in files.items() if paths}


def _settle(
    name: str, similar: list[Path], files: dict[str, list[Path]], folder: Path, report: Callable[[str], None]
) -> None:
    """`train_backup.jsonl` is no part of `train.jsonl`; a single `train_v2.jsonl` is the split where nothing else is.

    Raises:
        UserError: several could be the split.
    """
    names = ", ".join(f"`{path.name}`" for path in similar)
    if name in files:
        report(f"not read, beside `{files[name][0].name}` in `{folder}`: {names}")
    elif len(similar) == 1:
        files[name] = similar
    else:
        raise UserError(
            f"several files could be the split `{name}`: {names}",
            where=str(folder),
            next_step="name those to take: `train_file: ...` and `validation_file: ...` (a file or a pattern)",
        )


def _split_of(stem: str) -> tuple[str | None, bool]:
    """The split that a file's name begins with, and whether nothing but the number of a shard follows."""
    word = re.match(r"[a-z]+", stem.lower())
    known = {name for names in _SPLIT_NAMES.values() for name in names}
    if word is None or word.group() not in known:
        return None, False
    return word.group(), _SHARD.fullmatch(stem[word.end() :]) is not None


def _data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in FORMAT_OF_SUFFIX)


def _expand(path: Path, key: str) -> list[Path]:
    """The files that a path or a pattern stands for."""
    if path.is_file():
        return [path]
    if not glob.has_magic(str(path)):
        raise _no_such_path(path, key)
    matches = glob.iglob(str(path), recursive=True)  # noqa: PTH207  (a pattern may begin at the root)
    paths = sorted(match for match in map(Path, matches) if match.is_file())
    if not paths:
        raise UserError(
            f"`{key}: {path}` finds no file",
            where=str(Path.cwd()),
            next_step=f"these can be read: {FORMATS_IN_WORDS}",
        )
    return paths


def _no_such_path(path: Path, key: str) -> UserError:
    neighbors = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, neighbors, n=1)
    return UserError(
        f"there is no file or folder `{path}`",
        where=f"`{key}`, looked for in {Path.cwd()}",
        next_step=f"did you mean `{path.parent / near[0]}`?"
        if near
        else "check the path; it counts from the folder that you are in",
    )
