"""What `predict --input` reads: the files that training reads, line for line."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trietune.data.inputs import read_inputs, read_pipe
from trietune.data.opening import FileOptions
from trietune.errors import UserError


def given(placed: Iterable[tuple[str, Any]]) -> list[Any]:
    """Inputs without their places."""
    return [one for _, one in placed]


ROWS = [{"q": "one"}, {"q": "two\u2028three"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.jsonl", LINES.encode()),
        ("in.ndjson", LINES.encode()),
        ("in.json", json.dumps(ROWS).encode()),
        ("in.json", json.dumps({"data": ROWS}).encode()),
        ("in.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("in.csv", b"\xef\xbb\xbf" + 'q\none\n"two\u2028three"\n'.encode()),
        ("in.tsv", "q\tx\none\t1\ntwo\u2028three\t1\n".encode()),
        ("in.parquet", b""),
    ],
)
def test_rows_of_every_form_that_training_reads(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    if name == "in.parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    assert [row["q"] for row in given(read_inputs(path))] == [row["q"] for row in ROWS]


@pytest.mark.parametrize("name", ["in.txt", "in.md", "in"])
def test_line_n_of_a_text_is_input_n(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes("\ufeffone\r\n\n \u2028x\n\n".encode())
    assert given(read_inputs(path)) == ["one", "", " \u2028x", ""]
    assert given(read_pipe("\ufeffone\r\n\n \u2028x\n\n")) == ["one", "", " \u2028x", ""]


def test_a_whole_file_is_one_input_where_the_settings_say_so(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\n\ntwo\n")
    assert given(read_inputs(tmp_path / "in.txt", FileOptions(txt_unit="file"))) == ["one\n\ntwo\n"]


def test_a_pipe_of_json_lines_is_rows() -> None:
    assert given(read_pipe("\n" + LINES)) == ROWS
    assert given(read_pipe("")) == []
    with pytest.raises(UserError, match="stdin:3 is not JSON"):
        given(read_pipe(LINES + "text\n"))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("in.jsonl", b'{"q": 1}\n{', "in.jsonl:2: not JSON"),
        ("in.txt", b"M\xfcller\n", "`M\u00fcller`"),
        ("in.csv", b"q;x\n1;2\n", "csv_separator"),
        ("in.xlsx", b"PK\x03\x04", "as CSV"),
    ],
)
def test_what_cannot_be_read_is_named_as_in_training(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        given(read_inputs(tmp_path / name))
    with pytest.raises(UserError, match="no such file"):
        given(read_inputs(tmp_path / "other.txt"))


def test_a_packed_text_that_is_cut_or_damaged_is_named(tmp_path: Path) -> None:
    packed = gzip.compress("".join(f"text {number * 7919}\n" for number in range(5000)).encode())
    cut, flipped = tmp_path / "cut.txt.gz", tmp_path / "flipped.txt.gz"
    cut.write_bytes(packed[: len(packed) // 2])
    flipped.write_bytes(packed[:-6] + bytes([packed[-6] ^ 255]) + packed[-5:])
    for path, error in ((cut, EOFError), (flipped, gzip.BadGzipFile)):
        with pytest.raises(error), gzip.open(path) as file:
            file.read()
        with pytest.raises(UserError, match=f"cannot read `{path}`") as refused:
            given(read_inputs(path))
        assert refused.value.exit_code == 2


def test_what_is_there_but_no_file_is_called_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name, kind in (("pipe", "is a pipe"), ("folder", "is a folder"), ("link", "is a link to `nowhere`")):
        with pytest.raises(UserError, match=kind):
            given(read_inputs(tmp_path / name))
