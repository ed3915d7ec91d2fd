"""What a model is asked with: the files that training reads, and what comes through a pipe.

in.txt         each line a text, a blank one too, so that answer n answers line n
in.csv         each row by its columns
a pipe         lines of text, or of JSON if the first of them is an object
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trietune.data.files import BETWEEN, FORMAT_OF_SUFFIX, detect_format, format_suffix, read_rows, readable
from trietune.data.json_text import JsonDecoder, RepeatedKeyError
from trietune.data.opening import AS_USUAL, BrokenRow, FileOptions, no_plain_file, read_lines
from trietune.errors import UserError


def read_inputs(path: Path, options: FileOptions = AS_USUAL) -> Iterator[tuple[str, object]]:
    """The inputs of a file, each with its place, `in.csv:7`: texts of lines, or rows.

    A file of another name than those of data is read as text.

    Raises:
        UserError: it cannot be read, or a row of it cannot.
    """
    if not path.is_file():
        raise UserError(
            f"`--input {path}` cannot be read: it {kind}"
            if (kind := no_plain_file(path))
            else f"`--input {path}` cannot be read: there is no such file",
            next_step="`--input -` reads stdin: `... | trietune predict TARGET --input -`"
            if kind == "is a pipe"
            else "check the path",
        )
    with readable(path, options):
        yield from _read_file(path, options)


def _read_file(path: Path, options: FileOptions) -> Iterator[tuple[str, object]]:
    is_text = format_suffix(path) not in FORMAT_OF_SUFFIX or detect_format(path) == "txt"
    if is_text and options.txt_unit == "line":
        found: Iterator[tuple[int, object]] = read_lines(path, options, with_blank=True)
    else:
        found = read_rows(path, options)
    between = ":" if is_text else BETWEEN.get(detect_format(path), ":")
    for number, given in found:
        if isinstance(given, BrokenRow):
            raise UserError(f"{path}{between}{number}: {given.reason}", next_step="correct or remove this line")
        yield f"{path}{between}{number}", given["text"] if is_text and isinstance(given, dict) else given


def read_pipe(text: str) -> Iterator[tuple[str, object]]:
    """The inputs in text that came through a pipe, each with its place, `stdin:7`.

    Raises:
        UserError: lines that begin as JSON are none.
    """
    # Not `splitlines`: a text may hold the other separators that it knows.
    lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    if lines[-1] == "":
        lines.pop()  # behind the last line feed is no line
    is_json = next((line for line in lines if line.strip()), "").lstrip().startswith("{")
    decoder = JsonDecoder()
    for number, line in enumerate(lines, start=1):
        if not is_json:
            yield f"stdin:{number}", line
        elif line.strip():
            try:
                yield f"stdin:{number}", decoder.decode(line)
            except RepeatedKeyError as error:
                raise UserError(f"stdin:{number} has a {error}", next_step="remove one of the two values") from error
            except (ValueError, RecursionError) as error:
                what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                raise UserError(f"stdin:{number} is not JSON: {what}", next_step="correct this line") from None
