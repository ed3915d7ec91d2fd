"""The rows of one split, wherever they lie: local files, a data set of the hub, a part of either."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from trietune.data.files import BETWEEN, count_rows, detect_format, read_rows
from trietune.data.opening import AS_USUAL, BrokenRow, FileOptions, Row
from trietune.data.table_files import without_fillers
from trietune.errors import UserError

PlacedRow = tuple[str, Row | BrokenRow]


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
class FileRows:
    """Rows of one or more local files, one after the other."""

    paths: tuple[Path, ...]
    labels: tuple[str, ...]  # how each file is called in a place: its name, or enough of its path
    options: FileOptions = AS_USUAL

    @classmethod
    def of(cls, paths: Sequence[Path], options: FileOptions = AS_USUAL) -> FileRows:
        names = [path.name for path in paths]
        labels = names if len(set(names)) == len(names) else [str(path) for path in paths]
        return cls(tuple(paths), tuple(labels), options)

    @property
    def hub_id(self) -> None:
        return None

    @property
    def name(self) -> str:
        return self.labels[0] if len(self.paths) == 1 else f"{self.labels[0]} and {len(self.paths) - 1} more"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.options).encode() if self.options != AS_USUAL else b"")
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
            for _, row in read_rows(path, self.options):
                if not isinstance(row, BrokenRow):
                    return list(row)
        return []

    def count(self) -> int:
        return sum(count_rows(path, self.options) for path in self.paths)

    def quick_count(self) -> int | None:
        forms = {detect_format(path) for path in self.paths}
        return self.count() if forms <= {"parquet", "arrow", "jsonl", "tsv"} else None

    def read(self) -> Iterator[PlacedRow]:
        for path, label in zip(self.paths, self.labels, strict=True):
            between = BETWEEN.get(detect_format(path), ":")
            before, item = 0, 1
            for number, row in read_rows(path, self.options):
                # A JSON list is often one line: there the line tells nothing.
                item = item + 1 if number == before else 1
                before = number
                yield f"{label}{between}{number}" + (f" item {item}" if item > 1 else ""), row


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
        # Not datasets' own: that is another one offline, and after an upgrade.
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
                yield f"{self.split}:{number}", without_fillers(dict(zip(batch, values, strict=True)))
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


def _stamp_of(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"cannot read `{path}`: {error.strerror or error}") from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True, slots=True)
class NamedRows:
    """Rows of one of several data sets of the hub, whose places would be those of another: `train:7`."""

    rows: Rows

    @property
    def hub_id(self) -> str | None:
        return self.rows.hub_id

    @property
    def name(self) -> str:
        return self.rows.name

    def fingerprint(self) -> str:
        return f"{self.name}\0{self.rows.fingerprint()}"

    def stamp(self) -> tuple[tuple[int, ...], ...]:
        return self.rows.stamp()

    def columns(self) -> list[str]:
        return self.rows.columns()

    def count(self) -> int:
        return self.rows.count()

    def quick_count(self) -> int | None:
        return self.rows.quick_count()

    def read(self) -> Iterator[PlacedRow]:
        for place, row in self.rows.read():
            yield f"{self.name} {place}", row


def with_places_of_their_own(
    several: Sequence[Rows], name_files: Callable[[Sequence[str]], Sequence[str]]
) -> list[Rows]:
    """The same rows, whose names and places are each another's.

    Args:
        name_files: from paths to what each of them is called in a place.
    """
    files = [_files_of(rows) for rows in several]
    paths = list(dict.fromkeys(str(path) for one in files if one is not None for path in one.paths))
    label_of = dict(zip(paths, name_files(paths), strict=True))
    found: list[Rows] = []
    for rows, one in zip(several, files, strict=True):
        if one is None:
            found.append(NamedRows(rows))
            continue
        named = replace(one, labels=tuple(label_of[str(path)] for path in one.paths))
        found.append(replace(rows, rows=named) if isinstance(rows, SlicedRows) else named)
    return found


def _files_of(rows: Rows) -> FileRows | None:
    inner = rows.rows if isinstance(rows, SlicedRows) else rows
    return inner if isinstance(inner, FileRows) else None
