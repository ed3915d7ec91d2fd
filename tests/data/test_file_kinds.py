"""Files and folders as other programs leave them: read, or named with what reads them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from trietune.data.files import count_rows, read_rows
from trietune.data.folders import local_splits
from trietune.data.opening import FileOptions
from trietune.data.rows import FileRows
from trietune.errors import UserError

ROWS = [{"prompt": "a:", "completion": " b"}, {"prompt": "c:", "completion": " d"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "prompt,completion\na:, b\nc:, d\n"


def rows_of(path: Path, **options: Any) -> list[Any]:
    return [row for _, row in read_rows(path, FileOptions(**options))]


def write_feather(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)


def write_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(path), table.schema) as file:
        file.write_table(table)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.json", json.dumps({"data": ROWS})),
        ("a.json", json.dumps({"version": 1, "data": ROWS}, indent=2)),
        ("a.json", json.dumps({"train": ROWS})),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.jsonl", json.dumps(ROWS, indent=1)),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0)),
        ("a.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.feather", write_feather),
        ("a.arrow", write_stream),
    ],
)
def test_rows_of_a_file(name: str, content: str | bytes | Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert rows_of(path) == ROWS
    assert count_rows(path) == len(ROWS)


def test_json_lines_that_have_a_key_data_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"data": "x", "text": "y"}\n' * 2)
    assert rows_of(path) == [{"data": "x", "text": "y"}] * 2


@pytest.mark.parametrize(
    ("content", "key", "value"),
    [
        (b"prompt;completion\na:; b\nc:; d\n", "separator", ";"),
        (b"prompt|completion\na:| b\nc:| d\n", "separator", "|"),
        (CSV.encode("utf-16"), "encoding", "utf-16"),
        (CSV.encode("utf-16-le"), "encoding", "utf-16-le"),
    ],
)
def test_another_separator_or_a_wide_encoding_is_named_with_the_key_that_reads_it(
    content: bytes, key: str, value: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        rows_of(path)
    name = {"separator": "csv_separator", "encoding": "file_encoding"}[key]
    assert f"{name}: " in str(refused.value)
    assert value in str(refused.value)
    assert rows_of(path, **{key: value}) == ROWS


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt", "a.tsv"])
def test_bytes_of_windows_are_shown_as_they_would_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    text = {
        "a.csv": "text,x\nMüller,1\n", "a.jsonl": '{"text": "Müller"}\n', "a.json": '[{"text": "Müller"}]',
        "a.txt": "Müller\n", "a.tsv": "text\tx\nMüller\t1\n",
    }[name]  # fmt: skip
    path.write_bytes(text.encode("cp1252"))
    try:
        [said] = [row.reason for row in rows_of(path)]
    except UserError as error:
        said = str(error)
    assert "not UTF-8" in said
    assert "Müller" in said
    assert "file_encoding: cp1252" in said
    assert rows_of(path, encoding="cp1252")[0]["text"] == "Müller"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt"])
def test_a_replacement_character_of_the_data_is_text(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    text = {"a.csv": "text,x\n\ufffd!,1\n", "a.jsonl": '{"text": "\ufffd!"}\n', "a.txt": "\ufffd!\n"}[name]
    path.write_text(text, "utf-8")
    assert rows_of(path)[0]["text"] == "\ufffd!"


def test_a_workbook_is_named(tmp_path: Path) -> None:
    for name in ("a.xlsx", "a.csv", "a.jsonl"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 and more")
        with pytest.raises(UserError, match=r"save (it|the sheet) as CSV"):
            rows_of(tmp_path / name)


def test_a_packed_file_that_is_cut_off_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode() * 50)[:-20])
    with pytest.raises(UserError, match="cannot read"):
        rows_of(tmp_path / "a.jsonl.gz")


def test_lines_of_text_keep_their_numbers_and_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\nthree \u2028 still three\r\n", "utf-8", newline="")
    assert list(read_rows(path)) == [(1, {"text": "one"}), (2, {"text": ""}), (3, {"text": "three \u2028 still three"})]
    assert rows_of(path, txt_unit="file") == [{"text": "one\n\nthree \u2028 still three\r\n"}]
    said: list[str] = []
    local_splits(str(path), "train_file", said.append)
    assert said == ["`a.txt`: each line is a text; `txt_unit: file` takes each file as one"]


def test_tables_add_no_keys_to_nested_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    calls = [{"name": "f", "arguments": {"city": "Rome"}}, {"name": "g", "arguments": {"zip": "00100"}}]
    Dataset.from_list([{"calls": calls, "empty": None}]).save_to_disk(tmp_path / "saved")
    path.write_bytes(next((tmp_path / "saved").glob("*.arrow")).read_bytes())
    assert rows_of(path) == [{"calls": calls, "empty": None}]


# --- Folders


def split_rows(folder: str | Path) -> dict[str, list[Any]]:
    splits = local_splits(str(folder), "train_file", lambda _: None)
    return {name: [row for _, row in rows.read()] for name, rows in splits.items()}


def test_saved_data_sets_are_read_with_their_splits(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert split_rows(tmp_path / "one") == {"train": ROWS}
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "two")
    assert split_rows(tmp_path / "two") == {"train": ROWS, "test": ROWS[:1]}
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match="is not whole"):
        split_rows(tmp_path / "one")


def test_a_downloaded_data_set_has_the_configurations_of_its_readme(tmp_path: Path) -> None:
    for name in ("main", "extra"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train-00000-of-00001.jsonl").write_text(LINES)
        (tmp_path / name / "test.jsonl").write_text(LINES)
    expected = {"train": ROWS, "test": ROWS}
    for head in ("", "no head\n", "---\nconfigs: [1]\n---\n"):
        (tmp_path / "README.md").write_text(head)
        with pytest.raises(UserError, match="several data sets: `extra`, `main`") as refused:
            split_rows(tmp_path)
        assert f"{tmp_path}:extra" in str(refused.value)
        assert split_rows(f"{tmp_path}:main") == expected
    listed = [
        {"config_name": name, "data_files": [{"split": s, "path": f"{name}/{s}*"} for s in expected]}
        for name in ("main", "extra")
    ]
    (tmp_path / "README.md").write_text(f"---\n{json.dumps({'configs': listed})}\n---\nText\n")
    with pytest.raises(UserError, match="several configurations: `main`, `extra`"):
        split_rows(tmp_path)
    assert split_rows(f"{tmp_path}:main") == expected
    with pytest.raises(UserError, match="no file or folder"):
        split_rows(f"{tmp_path}:third")
    listed[0]["default"] = True  # type: ignore[assignment]
    (tmp_path / "README.md").write_text(f"---\n{json.dumps({'configs': listed})}\n---\nText\n")
    assert split_rows(tmp_path) == expected


def test_one_inner_folder_with_splits_is_the_data_set(tmp_path: Path) -> None:
    (tmp_path / "plain_text").mkdir()
    (tmp_path / "plain_text" / "train.jsonl.gz").write_bytes(gzip.compress(LINES.encode(), mtime=0))
    (tmp_path / "LICENSE.txt").write_text("all yours")
    assert split_rows(tmp_path) == {"train": ROWS}


def test_options_are_part_of_what_rows_are(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n")
    prints = {FileRows.of([path], FileOptions(txt_unit=unit)).fingerprint() for unit in ("line", "file")}
    assert len(prints) == 2
