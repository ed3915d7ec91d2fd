"""Read rows from a file, one at a time, with the line that each stands on.

    sentence<TAB>label             (1, Row)   is the header, not a row
    a fine film<TAB>1              (2, {"sentence": "a fine film", "label": "1"})
    dull                           (3, BrokenRow("1 column instead of 2"))

A row that cannot be read is a value and not an exception: whoever reads the whole file can then say how many there
are, and where. In JSON, an object with a key twice is such a row, and so is whatever follows the end. Tab-separated
files are read without quoting, as GLUE writes them: a quote in a sentence is text.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trietune.data.json_text import JsonDecoder, RepeatedKeyError, RepeatedKeys
from trietune.errors import UserError
from trietune.io.causes import first_line

Row = dict[str, Any]
Format = Literal["tsv", "csv", "jsonl", "json", "squad", "parquet"]

FORMAT_OF_SUFFIX: dict[str, Format] = {
    ".tsv": "tsv",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
FORMATS_IN_WORDS = "GLUE TSV (.tsv), SQuAD JSON or a JSON list (.json), JSONL (.jsonl), CSV (.csv), parquet (.parquet)"

# Enough of a file to see which form of JSON it is; SQuAD's outer keys come first, whatever writes it.
SNIFFED_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class BrokenRow:
    """A place where a row should be and none can be read; `reason` ends the sentence "line 7: ..."."""

    reason: str


NumberedRow = tuple[int, Row | BrokenRow]


def read_rows(path: Path) -> Iterator[NumberedRow]:
    """The rows of one file in order, each with its line number, counted from 1 (parquet: its row, SQuAD: its question).

    Memory stays bounded, except for `.json` files, which are read as a whole.

    Raises:
        UserError: the file cannot be opened, or is not in a form that is known.
    """
    reader = _READERS[detect_format(path)]
    try:
        yield from reader(path)
    except OSError as error:
        raise UserError(
            f"cannot read `{path}`: {error.strerror or error}", next_step="check the path and its rights"
        ) from None


def detect_format(path: Path) -> Format:
    """The form of a file, by its suffix, and by its first bytes for `.json`, which stands for three forms."""
    by_suffix = FORMAT_OF_SUFFIX.get(path.suffix.lower())
    if by_suffix is None:
        raise UserError(
            f"`{path.name}` has an unknown format",
            where=str(path),
            next_step=f"these can be read: {FORMATS_IN_WORDS}",
        )
    return _sniff_json(path) if by_suffix == "json" else by_suffix


def count_rows(path: Path) -> int:
    """How many rows `read_rows` will give, broken ones included; parses only what it must."""
    match detect_format(path):
        case "parquet":
            import pyarrow.parquet

            return int(_open_parquet(pyarrow.parquet, path).metadata.num_rows)
        case "jsonl":
            return _count_lines(path)
        case "tsv":
            return max(0, _count_lines(path) - 1)
    return sum(1 for _ in read_rows(path))


def _count_lines(path: Path) -> int:
    """Lines that are not blank."""
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _sniff_json(path: Path) -> Format:
    with path.open("rb") as file:
        start = file.read(SNIFFED_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        return "json"
    first_line = start.split(b"\n", 1)[0]
    if b'"paragraphs"' in start and b'"data"' in start:
        return "squad"
    try:
        is_object = isinstance(JsonDecoder().decode_marked(first_line.decode()), dict)
    except (ValueError, RecursionError):
        is_object = False
    if is_object and b'"data"' not in first_line:
        return "jsonl"
    if b'"data"' in start:
        return "squad"
    # A file without any recognizable start: the JSON reader says what is wrong with it, and where.
    return "json"


def _read_tsv(path: Path) -> Iterator[NumberedRow]:
    columns: list[str] = []
    for number, line in _read_lines(path):
        if isinstance(line, BrokenRow):
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


def _read_csv(path: Path) -> Iterator[NumberedRow]:
    # Texts are often longer than the 128 KiB that the module allows a cell by default.
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file, strict=True)
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
                _check_columns(columns, path)
            elif len(cells) != len(columns):
                yield number, _wrong_number_of_columns(len(cells), len(columns))
            elif any("\ufffd" in cell for cell in cells):
                yield number, BrokenRow("not UTF-8 text")
            else:
                yield number, dict(zip(columns, cells, strict=True))


def _read_jsonl(path: Path) -> Iterator[NumberedRow]:
    decode = JsonDecoder().decode
    for number, line in _read_lines(path):
        if isinstance(line, BrokenRow):
            yield number, line
            continue
        try:
            row = decode(line)
        except (ValueError, RecursionError) as error:
            yield number, BrokenRow(_json_error(error))
            continue
        yield number, row if isinstance(row, dict) else BrokenRow("a JSON value that is not an object {...}")


def _read_json_list(path: Path) -> Iterator[NumberedRow]:
    """Items are decoded one after the other, so that each is known by its line."""
    text = _read_text(path)
    decoder = JsonDecoder()
    position, number = _skip_space(text, 0), 1
    if not text.startswith("[", position):
        raise UserError(
            f"`{path.name}` is not a JSON list of objects",
            where=f"{path}, line 1",
            next_step='write `[{"prompt": "...", "completion": "..."}, ...]`, or one object per line as .jsonl',
        )
    number += text.count("\n", 0, position)
    seen = position
    position = _skip_space(text, position + 1)
    while not text.startswith("]", position):
        number += text.count("\n", seen, position)
        seen = position
        try:
            row, repeated, position = decoder.decode_at(text, position)
        except (ValueError, RecursionError) as error:
            # What follows a syntax error has no place that could be trusted.
            yield number, BrokenRow(_json_error(error))
            return
        if repeated is not None:
            yield number, BrokenRow(_duplicate(repeated))
        else:
            yield number, row if isinstance(row, dict) else BrokenRow("a JSON value that is not an object {...}")
        position = _skip_space(text, position)
        if text.startswith(",", position):
            position = _skip_space(text, position + 1)
        elif not text.startswith("]", position):
            yield number, BrokenRow("the list does not go on with `,` or end with `]` after this item")
            return
    end = position + 1
    beyond = _skip_space(text, end)
    if beyond < len(text):
        number += text.count("\n", seen, beyond)
        yield number, BrokenRow(f"the list has ended, and {len(text[beyond:].rstrip()):,} more characters follow")


def _read_squad(path: Path) -> Iterator[NumberedRow]:
    """One row per question, counted from 1, in the hub's columns: line numbers mean nothing inside one JSON value."""
    number = 0
    try:
        document = JsonDecoder().decode_marked(_read_text(path))
        _check_squad_object(document, "the file", path)
        for place, article in enumerate(document["data"], start=1):
            _check_squad_object(article, f"article {place}", path)
            for paragraph in article["paragraphs"]:
                _check_squad_object(paragraph, f"a paragraph of article {place}", path)
                context = paragraph["context"]
                for qa in paragraph["qas"]:
                    number += 1
                    if (repeated := _repeated_in_question(qa)) is not None:
                        yield number, BrokenRow(_duplicate(repeated))
                        continue
                    answers = [] if qa.get("is_impossible") else [answer["text"] for answer in qa["answers"]]
                    row = {"context": context, "question": qa["question"], "answers": {"text": answers}}
                    yield number, row if qa.get("id") is None else {"id": str(qa["id"]), **row}
    except json.JSONDecodeError as error:
        raise UserError(
            f"`{path.name}` is not JSON: {error.msg}",
            where=f"{path}, line {error.lineno}, column {error.colno}",
            next_step="the file may be cut off; copy or download it again",
        ) from None
    except RecursionError:
        raise UserError(
            f"`{path.name}` is nested too deeply", where=str(path), next_step="take lists or objects out of each other"
        ) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"`{path.name}` is not in SQuAD's form: {_missing(error)}",
            where=str(path),
            next_step='SQuAD files read {"data": [{"paragraphs": [{"context": ..., "qas": [{"question": ..., '
            '"answers": [{"text": ...}]}]}]}]}',
        ) from None


def _check_squad_object(value: object, name: str, path: Path) -> None:
    if isinstance(value, RepeatedKeys):
        raise UserError(
            f"{name} has the key `{value.repeated}` twice, so it is not clear which is meant",
            where=str(path),
            next_step="remove one of the two",
        )


def _repeated_in_question(qa: Any) -> str | None:
    """A key that stands twice in a question or in one of its answers."""
    answers = qa.get("answers") if isinstance(qa, dict) else None
    parts = [qa, *(answers if isinstance(answers, list) else ())]
    return next((part.repeated for part in parts if isinstance(part, RepeatedKeys)), None)


def _duplicate(key: str) -> str:
    return str(RepeatedKeyError(key))


def _read_parquet(path: Path) -> Iterator[NumberedRow]:
    import pyarrow.parquet

    number = 0
    file = _open_parquet(pyarrow.parquet, path)
    # As rows, the last of two columns of one name would win.
    _check_columns(file.schema_arrow.names, path)
    try:
        for batch in file.iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except Exception as error:  # a page that was cut or flipped, or an object whose field stands twice
        raise _unreadable_parquet(path, error, f"{path}, after row {number:,}") from None


def _open_parquet(parquet: Any, path: Path) -> Any:
    try:
        return parquet.ParquetFile(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # pyarrow's errors share no base of their own
        raise _unreadable_parquet(path, error, str(path)) from None


def _unreadable_parquet(path: Path, error: Exception, where: str) -> UserError:
    return UserError(
        f"`{path.name}` is not a parquet file that can be read: {first_line(error)}",
        where=where,
        next_step="copy or download it again",
    )


def _read_lines(path: Path) -> Iterator[tuple[int, str | BrokenRow]]:
    """Lines end with a line feed and nothing else: text may hold the other separators that `str.splitlines` knows."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            line = line.rstrip(b"\r\n")
            if not line.strip():
                continue
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                yield number, BrokenRow(f"not UTF-8 text (byte {error.start + 1})")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"`{path.name}` is not UTF-8 text (byte {error.start + 1})",
            where=str(path),
            next_step="convert it, for example `iconv -f latin1 -t utf-8 OLD > NEW`",
        ) from None


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


def _json_error(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "JSON that is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}, column {error.colno}"
    return str(error) if isinstance(error, RepeatedKeyError) else "not JSON"


def _missing(error: Exception) -> str:
    return (
        f"no {error} where one belongs"
        if isinstance(error, KeyError)
        else "a value of another kind where a list belongs"
    )


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


_READERS: dict[Format, Callable[[Path], Iterator[NumberedRow]]] = {
    "tsv": _read_tsv,
    "csv": _read_csv,
    "jsonl": _read_jsonl,
    "json": _read_json_list,
    "squad": _read_squad,
    "parquet": _read_parquet,
}
