"""Rows of tables: tab-separated and comma-separated files, parquet and arrow."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trietune.data.opening import (
    BrokenRow,
    FileOptions,
    NumberedRow,
    is_wrong_encoding,
    open_text,
    read_lines,
    wrong_encoding,
)
from trietune.errors import UserError
from trietune.io.causes import first_line
from trietune.io.json_types import JsonObject

_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def read_tsv(path: Path, options: FileOptions) -> Iterator[NumberedRow]:
    columns: list[str] = []
    for number, line in read_lines(path, options):
        if isinstance(line, BrokenRow):
            if not columns:
                raise _header_of_other_encoding(path, line)
            yield number, line
        elif not columns:
            columns = line.split("\t")
            _check_columns(columns, path)
        else:
            cells = line.split("\t")
            if len(cells) != len(columns):
                yield number, _wrong_number_of_columns(len(cells), len(columns))
            else:
                yield number, dict(zip(columns, cells, strict=True))


def read_csv(path: Path, options: FileOptions) -> Iterator[NumberedRow]:
    # Texts are often longer than the 128 KiB that the module allows a cell by default.
    csv.field_size_limit(1 << 30)
    with open_text(path, options) as file:
        reader = csv.reader(file, strict=True, delimiter=options.separator)
        columns: list[str] = []
        while True:
            # A cell in quotes may span lines; the row is found by the line it begins on.
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, BrokenRow(f"not CSV: {error}")
                continue
            if not cells:
                continue
            if not columns:
                columns = cells
                if wrong := next((cell for cell in cells if is_wrong_encoding(cell)), None):
                    raise _header_of_other_encoding(path, wrong_encoding(wrong, options))
                _check_separator(columns, path, options)
                _check_columns(columns, path)
            elif len(cells) != len(columns):
                yield number, _wrong_number_of_columns(len(cells), len(columns))
            elif wrong := next((cell for cell in cells if is_wrong_encoding(cell)), None):
                yield number, wrong_encoding(wrong, options)
            else:
                yield number, dict(zip(columns, cells, strict=True))


def read_parquet(path: Path, options: FileOptions) -> Iterator[NumberedRow]:
    import pyarrow.parquet

    number = 0
    file = open_parquet(pyarrow.parquet, path)
    # As rows, the last of two columns of one name would win.
    _check_columns(file.schema_arrow.names, path)
    try:
        for batch in file.iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                number += 1
                yield number, without_fillers(row)
    except Exception as error:  # a page that was cut or flipped, or an object whose field stands twice
        raise _unreadable("a parquet", path, error, f"{path}, after row {number:,}") from None


def open_parquet(parquet: Any, path: Path) -> Any:
    try:
        return parquet.ParquetFile(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # pyarrow's errors share no base of their own
        raise _unreadable("a parquet", path, error, str(path)) from None


def _unreadable(kind: str, path: Path, error: Exception, where: str) -> UserError:
    return UserError(
        f"`{path.name}` is not {kind} file that can be read: {first_line(error)}",
        where=where,
        next_step="copy or download it again",
    )


def read_arrow(path: Path, options: FileOptions) -> Iterator[NumberedRow]:
    """Rows of an arrow file, a stream (as `datasets` saves) or with a table of contents (feather)."""
    number = 0
    with _open_arrow(path) as batches:
        try:
            for batch in batches:
                _check_columns(batch.schema.names, path)
                for row in batch.to_pylist():
                    number += 1
                    yield number, without_fillers(row)
        except UserError:
            raise
        except Exception as error:  # a batch that was cut or flipped: pyarrow's errors, or text that is not UTF-8
            raise _unreadable("an arrow", path, error, f"{path}, after row {number:,}") from None


def count_arrow(path: Path) -> int:
    """How many rows an arrow file has."""
    with _open_arrow(path) as batches:
        try:
            return sum(batch.num_rows for batch in batches)
        except Exception as error:
            raise _unreadable("an arrow", path, error, str(path)) from None


@contextmanager
def _open_arrow(path: Path) -> Iterator[Iterator[Any]]:
    import pyarrow as pa

    with path.open("rb") as file:
        has_contents = file.read(6) == b"ARROW1"
    # Not mapped into memory: a mapped file that is cut short kills the process without a word.
    with pa.OSFile(str(path)) as source:
        try:
            if has_contents:
                table = pa.ipc.open_file(source)
                batches = (table.get_batch(index) for index in range(table.num_record_batches))
            else:
                batches = iter(pa.ipc.open_stream(source))
        except Exception as error:
            raise _unreadable("an arrow", path, error, str(path)) from None
        yield batches


def without_fillers(row: JsonObject) -> JsonObject:
    """A row of a table whose nested objects have only the keys that they were written with.

    Tables give every object the keys of all: `{"city": "Rome", "zip": null}`, where one call has a `zip`.
    """
    return {name: _filled(value) if isinstance(value, list | dict) else value for name, value in row.items()}


def _filled(value: object) -> object:
    if isinstance(value, dict):
        return {key: _filled(one) for key, one in value.items() if one is not None}
    return [_filled(one) for one in value] if isinstance(value, list) else value


def _header_of_other_encoding(path: Path, row: BrokenRow) -> UserError:
    return UserError(
        f"`{path.name}` is {row.reason}",
        where=f"{path}, line 1",
        next_step="file_encoding: cp1252     (or save it as UTF-8)",
    )


def _check_separator(columns: list[str], path: Path, options: FileOptions) -> None:
    if len(columns) != 1:
        return
    for separator, name in _OTHER_SEPARATORS.items():
        if separator in columns[0] and separator != options.separator:
            raise UserError(
                f"the columns of `{path.name}` are separated by {name}",
                where=f"{path}, line 1: {columns[0][:80]}",
                next_step=f"csv_separator: {json.dumps(separator)}",
            )


def _check_columns(columns: list[str], path: Path) -> None:
    repeated = sorted(name for name, count in Counter(columns).items() if count > 1)
    if repeated:
        raise UserError(
            f"column `{repeated[0]}` appears twice in the header of `{path.name}`",
            where=f"{path}, line 1" if path.suffix.lower() != ".parquet" else str(path),
            next_step="name each column once; the first line of a TSV or CSV file is its header",
        )


def _wrong_number_of_columns(found: int, expected: int) -> BrokenRow:
    return BrokenRow(f"{found} column{'s' if found != 1 else ''} instead of {expected}")
