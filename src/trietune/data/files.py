"""Read rows from a file, one at a time, with the line that each stands on.

    sentence<TAB>label             (1, Row)   is the header, not a row
    a fine film<TAB>1              (2, {"sentence": "a fine film", "label": "1"})
    dull                           (3, BrokenRow("1 column instead of 2"))

A row that cannot be read is a value and not an exception: the reader of the whole file can then say how many there
are, and where. In JSON, an object with a key twice is such a row, and so is whatever follows the end. Tab-separated
files are read without quoting, as GLUE writes them: a quote in a sentence is text. A file may be packed by gzip.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from trietune.data.json_files import find_list, read_json_list, read_jsonl, read_squad, read_wrapped
from trietune.data.json_text import JsonDecoder
from trietune.data.opening import (
    AS_USUAL,
    BrokenRow,
    FileOptions,
    NumberedRow,
    Row,
    not_of_encoding,
    open_bytes,
    read_lines,
    read_start,
    read_text,
)
from trietune.data.table_files import count_arrow, open_parquet, read_arrow, read_csv, read_parquet, read_tsv
from trietune.errors import UserError

__all__ = ["BrokenRow", "FileOptions", "NumberedRow", "Row", "count_rows", "detect_format", "is_data_file", "read_rows"]

Format = Literal["tsv", "csv", "jsonl", "json", "wrapped", "squad", "parquet", "arrow", "txt"]

FORMAT_OF_SUFFIX: dict[str, Format] = {
    ".tsv": "tsv",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "txt",
    ".text": "txt",
}
FORMATS_IN_WORDS = (
    "JSONL (.jsonl, .ndjson), a JSON list or SQuAD's form (.json), CSV (.csv), GLUE TSV (.tsv), parquet (.parquet), "
    "arrow (.arrow), text (.txt), each also packed (.gz)"
)
_WORKBOOKS = (".xlsx", ".xls", ".xlsm", ".ods")
# Where a row stands is told by a line, except in these.
BETWEEN: dict[Format, str] = {"squad": " question ", "parquet": " row ", "arrow": " row ", "wrapped": " item "}

# Enough of a file to see which form of JSON it is; SQuAD's outer keys come first, whatever writes it.
SNIFFED_BYTES = 65_536


def read_rows(path: Path, options: FileOptions = AS_USUAL) -> Iterator[NumberedRow]:
    """The rows of one file in order, each with its line number, counted from 1 (parquet: its row, SQuAD: its question).

    Memory stays bounded, except for `.json` files, which are read as a whole.

    Raises:
        UserError: the file cannot be opened, or is not in a form that is known.
    """
    reader = _READERS[detect_format(path)]
    with readable(path, options):
        yield from reader(path, options)


@contextmanager
def readable(path: Path, options: FileOptions = AS_USUAL) -> Iterator[None]:
    """Turn what reading a file raises into a `UserError` that names it: rights, a cut archive, another encoding."""
    try:
        yield
    except UnicodeError as error:
        raise not_of_encoding(path, options, error) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"cannot read `{path}`: {getattr(error, 'strerror', None) or error}",
            next_step="check the path and its rights; a packed file may be cut off",
        ) from None


def format_suffix(path: Path) -> str:
    """The end of a file's name that says its form: `.jsonl` of `a.jsonl.gz`."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def is_data_file(path: Path) -> bool:
    """Whether a file's name says that it holds rows."""
    return format_suffix(path) in FORMAT_OF_SUFFIX


def detect_format(path: Path) -> Format:
    """The form of a file, by its suffix, and for JSON by its first bytes: `.json` stands for several forms."""
    suffix = format_suffix(path)
    by_suffix = FORMAT_OF_SUFFIX.get(suffix)
    if by_suffix is None:
        if suffix in _WORKBOOKS:
            raise UserError(
                f"`{path.name}` is a workbook, and those are not read",
                where=str(path),
                next_step="save the sheet as CSV (UTF-8)",
            )
        raise UserError(
            f"`{path.name}` has an unknown format",
            where=str(path),
            next_step=f"these can be read: {FORMATS_IN_WORDS}",
        )
    if by_suffix not in ("json", "jsonl"):
        return by_suffix
    with readable(path):
        return _sniff_json(path, by_suffix)


def count_rows(path: Path, options: FileOptions = AS_USUAL) -> int:
    """How many rows `read_rows` will give, broken ones included; parses only what it must."""
    form = detect_format(path)
    with readable(path, options):
        match form:
            case "parquet":
                import pyarrow.parquet

                return int(open_parquet(pyarrow.parquet, path).metadata.num_rows)
            case "arrow":
                return count_arrow(path)
            case "jsonl":
                return sum(1 for _ in read_lines(path, options))
            case "tsv":
                return max(0, sum(1 for _ in read_lines(path, options)) - 1)
    return sum(1 for _ in read_rows(path, options))


def _sniff_json(path: Path, by_suffix: Format) -> Format:
    start = read_start(path, SNIFFED_BYTES).lstrip()
    if start.startswith(b"["):
        return "json"
    if by_suffix == "jsonl":
        return "jsonl"
    if b'"paragraphs"' in start and b'"data"' in start:
        return "squad"
    first_line, rest = _first_line(path)
    try:
        document = JsonDecoder().decode_marked(first_line.decode())
    except RecursionError:
        return "squad" if b'"data"' in start else "json"
    except ValueError:
        # One object over many lines, or nothing that is known: its reader says what is wrong with it, and where.
        return "wrapped" if start.startswith(b"{") and b'"paragraphs"' not in start and _is_whole(path) else "json"
    if not isinstance(document, dict):
        return "json"
    if rest or (find_list(document) is None and not isinstance(document.get("data"), list)):
        return "jsonl"
    return "wrapped" if find_list(document) is not None else "squad"


def _first_line(path: Path) -> tuple[bytes, bool]:
    """The first line that is not blank, and whether others follow."""
    with open_bytes(path) as file:
        lines = (line for line in file if line.removeprefix(b"\xef\xbb\xbf").strip())
        first = next(lines, b"")
        return first.removeprefix(b"\xef\xbb\xbf").strip(), next(lines, None) is not None


def _is_whole(path: Path) -> bool:
    """Whether a file is one JSON object."""
    try:
        return isinstance(JsonDecoder().decode_marked(read_text(path, AS_USUAL)), dict)
    except (ValueError, RecursionError, UserError):
        return False


def _read_txt(path: Path, options: FileOptions) -> Iterator[NumberedRow]:
    """Each line as a text, an empty one for a blank line; or the whole file."""
    if options.txt_unit == "file":
        yield 1, {"text": read_text(path, options)}
        return
    for number, line in read_lines(path, options, with_blank=True):
        yield number, line if isinstance(line, BrokenRow) else {"text": line}


_READERS: dict[Format, Callable[[Path, FileOptions], Iterator[NumberedRow]]] = {
    "tsv": read_tsv,
    "csv": read_csv,
    "jsonl": read_jsonl,
    "json": read_json_list,
    "wrapped": read_wrapped,
    "squad": read_squad,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "txt": _read_txt,
}
