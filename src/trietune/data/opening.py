"""Files as text: packed or not, in the encoding that the settings name, with an error that names what else it is."""

from __future__ import annotations

import gzip
import io
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, TextIO

from trietune.errors import UserError
from trietune.io.json_types import JsonObject

Row = JsonObject
_UTF8 = ("utf-8", "utf8", "utf-8-sig")
_GZIP, _ZIP = b"\x1f\x8b", b"PK\x03\x04"
_OLD_OFFICE = b"\xd0\xcf\x11\xe0"
# How much of a line that cannot be decoded is shown, around the place.
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class FileOptions:
    """What a file does not say of itself.

    Attributes:
        encoding: of text, as Python names it.
        separator: of the columns of .csv files.
        txt_unit: whether each line of a .txt file is a text, or each file.
    """

    encoding: str = "utf-8"
    separator: str = ","
    txt_unit: Literal["line", "file"] = "line"

    @property
    def is_utf8(self) -> bool:
        return self.encoding.lower() in _UTF8


AS_USUAL = FileOptions()


@dataclass(frozen=True, slots=True)
class BrokenRow:
    """A place where a row should be and none can be read; `reason` ends the sentence "line 7: ..."."""

    reason: str


NumberedRow = tuple[int, Row | BrokenRow]


def open_bytes(path: Path) -> IO[bytes]:
    """The file's content, unpacked if it is packed by gzip, whatever its name.

    Raises:
        UserError: it is a workbook or another archive.
    """
    with path.open("rb") as file:
        start = file.read(4)
    if start in (_ZIP, _OLD_OFFICE):
        raise UserError(
            f"`{path.name}` is an Excel workbook or an archive, and no text",
            where=str(path),
            next_step="save it as CSV (UTF-8), or unpack it",
        )
    return gzip.open(path, "rb") if start.startswith(_GZIP) else path.open("rb")  # type: ignore[return-value]


def read_start(path: Path, size: int) -> bytes:
    """The first bytes of the content as UTF-8, without a byte order mark."""
    with open_bytes(path) as file:
        return file.read(size).removeprefix(b"\xef\xbb\xbf")


def open_text(path: Path, options: FileOptions) -> TextIO:
    """The content as text; bytes that are not of the encoding become lone surrogates, see `is_wrong_encoding`."""
    _check_wide(path, options)
    encoding = "utf-8-sig" if options.is_utf8 else options.encoding
    errors = "surrogateescape" if options.is_utf8 else "strict"
    return io.TextIOWrapper(open_bytes(path), encoding=encoding, errors=errors, newline="")


def no_plain_file(path: Path) -> str | None:
    """What stands at a path that cannot be opened as a file: "is a folder"; None where there is nothing at all."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            return f"is a link to `{path.readlink()}`, which cannot be followed ({error.strerror})"
        return None
    if stat.S_ISDIR(mode):
        return "is a folder"
    return "is a pipe" if stat.S_ISFIFO(mode) else "is a device or a socket"


def is_wrong_encoding(text: str) -> bool:
    """Whether text that `open_text` gave holds bytes that are not of its encoding."""
    return any("\udc80" <= character <= "\udcff" for character in text)


def read_lines(path: Path, options: FileOptions, *, with_blank: bool = False) -> Iterator[tuple[int, str | BrokenRow]]:
    """Lines with their numbers, blank ones only if asked for.

    They end with a line feed and nothing else: text may hold the other separators that `str.splitlines` knows.
    """
    _check_wide(path, options)
    if not options.is_utf8:
        yield from _read_other_lines(path, options, with_blank)
        return
    with open_bytes(path) as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            line = line.rstrip(b"\r\n")
            if not line.strip() and not with_blank:
                continue
            try:
                yield number, line.decode()
            except UnicodeDecodeError:
                yield number, wrong_encoding(line.decode("utf-8", "surrogateescape"), options)


def _read_other_lines(path: Path, options: FileOptions, with_blank: bool) -> Iterator[tuple[int, str | BrokenRow]]:
    with io.TextIOWrapper(open_bytes(path), encoding=options.encoding, newline="\n") as file:
        lines = enumerate(file, start=1)
        while True:
            try:
                number, line = next(lines)
            except StopIteration:
                return
            except UnicodeError as error:
                raise not_of_encoding(path, options, error) from None
            line = (line.removeprefix("\ufeff") if number == 1 else line).rstrip("\r\n")
            if line.strip() or with_blank:
                yield number, line


def read_text(path: Path, options: FileOptions) -> str:
    """The whole file.

    Raises:
        UserError: it is not of the encoding.
    """
    with open_text(path, options) as file:
        try:
            text = file.read().removeprefix("\ufeff")
        except UnicodeError as error:
            raise not_of_encoding(path, options, error) from None
    if not is_wrong_encoding(text):
        return text
    place = next(index for index, character in enumerate(text) if is_wrong_encoding(character))
    number = text.count("\n", 0, place) + 1
    raise UserError(
        f"`{path.name}` is {wrong_encoding(text[text.rfind(chr(10), 0, place) + 1 :][: place + 200], options).reason}",
        where=f"{path}, line {number}",
        next_step="file_encoding: cp1252     (or save it as UTF-8)",
    )


def wrong_encoding(text: str, options: FileOptions) -> BrokenRow:
    """What to say of text with bytes that are not UTF-8: what it would be in the encoding of Windows."""
    place = next(index for index, character in enumerate(text) if is_wrong_encoding(character))
    begin, end = max(0, place - _SHOWN), place + _SHOWN
    number = len(text[:place].encode("utf-8", "surrogateescape")) + 1
    raw = text[begin:end].encode("utf-8", "surrogateescape")
    reads = raw.decode("cp1252", "replace").strip()
    return BrokenRow(f"not UTF-8 text (byte {number}); as cp1252 it reads `{reads}`, with `file_encoding: cp1252`")


def _check_wide(path: Path, options: FileOptions) -> None:
    """Refuse UTF-16, which every editor shows as text and no reader of UTF-8 understands."""
    if not options.is_utf8:
        return
    with open_bytes(path) as file:
        start = file.read(1024)
    is_marked = start.startswith((b"\xff\xfe", b"\xfe\xff"))
    even, odd = start[::2].count(0), start[1::2].count(0)
    if is_marked or (max(even, odd) > len(start) // 5 and min(even, odd) == 0):
        name = "utf-16" if is_marked else "utf-16-le" if odd else "utf-16-be"
        raise UserError(
            f"`{path.name}` is UTF-16 text",
            where=str(path),
            next_step=f"file_encoding: {name}     (or save it as UTF-8)",
        )


def not_of_encoding(path: Path, options: FileOptions, error: UnicodeError) -> UserError:
    """The whole file is refused: its bytes are not those of the encoding that was named."""
    return UserError(
        f"`{path.name}` is not {options.encoding} text: {error}",
        where=f"{path}; `file_encoding: {options.encoding}`",
        next_step="file_encoding: utf-8     (or the encoding that it was saved in)",
    )
