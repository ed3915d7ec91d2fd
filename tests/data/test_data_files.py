"""Reading rows: every format, every kind of damage, always with the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trietune.data.files import BrokenRow, count_rows, detect_format, read_rows
from trietune.errors import UserError

ROWS = [{"sentence": "fine", "label": "1"}, {"sentence": 'a "quoted, dull" film', "label": "0"}]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def as_tsv(path: Path) -> Path:
    return write(path, 'sentence\tlabel\nfine\t1\na "quoted, dull" film\t0\n')


def as_csv(path: Path) -> Path:
    return write(path, 'sentence,label\r\nfine,1\r\n"a ""quoted, dull"" film",0\r\n')


def as_jsonl(path: Path) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in ROWS))


def as_json(path: Path) -> Path:
    return write(path, json.dumps(ROWS, indent=1))


def as_parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize(
    ("name", "make", "lines"),
    [
        ("a.tsv", as_tsv, [2, 3]),
        ("a.csv", as_csv, [2, 3]),
        ("a.jsonl", as_jsonl, [1, 2]),
        ("a.ndjson", as_jsonl, [1, 2]),
        ("jsonl-inside.json", as_jsonl, [1, 2]),
        ("a.json", as_json, [2, 6]),
        ("a.parquet", as_parquet, [1, 2]),
    ],
)
def test_every_format_gives_the_same_rows_and_its_lines(tmp_path: Path, name: str, make: Any, lines: list[int]) -> None:
    path = make(tmp_path / name)
    assert list(read_rows(path)) == list(zip(lines, ROWS, strict=True))
    assert count_rows(path) == len(ROWS)


def test_quotes_and_odd_line_separators_in_a_tsv_are_text(tmp_path: Path) -> None:
    sentence = 'an opening " that never closes, \u2028 and \x0b and \x85'
    path = write(tmp_path / "a.tsv", f"sentence\tlabel\n{sentence}\t1\nnext\t0\n")
    assert [row for _, row in read_rows(path)] == [
        {"sentence": sentence, "label": "1"},
        {"sentence": "next", "label": "0"},
    ]


def test_byte_order_mark_and_carriage_returns_are_no_text(tmp_path: Path) -> None:
    for name, text in (
        ("a.tsv", b"\xef\xbb\xbfsentence\tlabel\r\nfine\t1\r\n"),
        ("a.csv", b"\xef\xbb\xbfsentence,label\r\nfine,1\r\n"),
        ("a.jsonl", b'\xef\xbb\xbf{"sentence": "fine", "label": "1"}\r\n\r\n'),
        ("a.json", b'\xef\xbb\xbf[{"sentence": "fine", "label": "1"}]'),
    ):
        assert [row for _, row in read_rows(write(tmp_path / name, text))] == [ROWS[0]]


def test_a_csv_cell_may_span_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"two\nlines",1\nnext,0\n')
    assert list(read_rows(path)) == [(2, {"text": "two\nlines", "label": "1"}), (4, {"text": "next", "label": "0"})]


@pytest.mark.parametrize(
    ("name", "text", "line", "reason"),
    [
        ("a.tsv", "sentence\tlabel\nfine\n", 2, "1 column instead of 2"),
        ("a.tsv", "sentence\tlabel\nfine\t1\nfine\t1\t3\n", 3, "3 columns instead of 2"),
        ("a.tsv", b"sentence\tlabel\ncaf\xe9\t1\n", 2, "not UTF-8"),
        ("a.csv", "a,b\n1\n", 2, "1 column instead of 2"),
        ("a.csv", 'a,b\n"x"y,2\n', 2, "not CSV"),
        ("a.csv", b"a,b\ncaf\xe9,2\n", 2, "not UTF-8"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', 2, "not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', 2, "not an object"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', 2, "not JSON"),
        ("a.json", '[{"a": 1},\n3]', 2, "not an object"),
        ("a.json", '[{"a": 1}\n{"a": 2}]', 1, "does not continue"),
        ("a.json", '[{"a": 1},', 1, "not JSON"),
        ("a.json", '[{"a": 1}]\n[{"a": 2}]', 2, "the list has ended, and 10 more characters follow"),
        ("a.json", '[]\n\n{"a": 2}\n', 3, "the list has ended"),
        ("a.json", '[{"a": 1}]]', 1, "the list has ended"),
        ("a.jsonl", '{"a": 1}\n{"a": 1}{"a": 2}\n', 2, "not JSON: Extra data"),
        ("a.json", '{"a": 1}\n{"a": 1} x\n', 2, "not JSON: Extra data"),
        ("a.json", '[{"a": 1},\n{"a": 1, "a": 2},\n{"a": 3}]', 2, "duplicate key `a`"),
        ("a.jsonl", '{"a": 1, "b": 2, "b": 2}\n{"a": 1}\n', 1, "duplicate key `b`"),
        ("a.ndjson", '{"a": {"b": [{"c": 1, "c": 2}]}}\n{"a": 1}\n', 1, "duplicate key `c`"),
        ("a.json", '{"a": 1, "\\u0061": 2}\n{"a": 1}\n', 1, "duplicate key `a`"),
        ("a.json", '[{"messages": [{"role": "user", "role": "x"}]}]', 1, "duplicate key `role`"),
        ("a.json", '[{"a": 1},\n{"a": ' + 100_000 * "[" + "]}]", 2, "nested too deeply"),
    ],
)
def test_a_broken_row_says_where_and_why(tmp_path: Path, name: str, text: str | bytes, line: int, reason: str) -> None:
    broken = [(number, row) for number, row in read_rows(write(tmp_path / name, text)) if isinstance(row, BrokenRow)]
    assert len(broken) == 1
    number, row = broken[0]
    assert number == line
    assert reason in row.reason


def test_squad_gives_one_row_a_question(tmp_path: Path) -> None:
    file = {
        "version": "v2.0",
        "data": [
            {
                "title": "T",
                "paragraphs": [
                    {
                        "context": "c",
                        "qas": [
                            {"id": "1", "question": "q?", "answers": [{"text": "a"}, {"text": "b"}]},
                            {"id": "2", "question": "r?", "answers": [{"text": "x"}], "is_impossible": True},
                        ],
                    }
                ],
            }
        ],
    }
    for indent in (None, 2):
        path = write(tmp_path / "dev.json", json.dumps(file, indent=indent))
        assert detect_format(path) == "squad"
        assert [row for _, row in read_rows(path)] == [
            {"id": "1", "context": "c", "question": "q?", "answers": {"text": ["a", "b"]}},
            {"id": "2", "context": "c", "question": "r?", "answers": {"text": []}},
        ]


def test_rows_after_a_repeated_key_are_read_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[{"a": 1, "a": 2},\n{"a": 3}\n,{"a": 4}]\n \n')
    assert list(read_rows(path)) == [(1, BrokenRow("duplicate key `a`")), (2, {"a": 3}), (3, {"a": 4})]


@pytest.mark.parametrize(
    "qa",
    [
        '{"question": "q?", "question": "r?", "answers": []}',
        '{"question": "q?", "answers": [{"text": "a", "text": "b"}]}',
        '{"question": "q?", "answers": [{"text": "a"}], "is_impossible": true, "is_impossible": false}',
    ],
)
def test_a_question_with_a_key_twice_is_a_broken_row(tmp_path: Path, qa: str) -> None:
    whole = '{"question": "w?", "answers": [{"text": "a"}]}'
    text = f'{{"data": [{{"paragraphs": [{{"context": "c", "qas": [{qa}, {whole}]}}]}}]}}'
    rows = list(read_rows(write(tmp_path / "dev.json", text)))
    assert [number for number, _ in rows] == [1, 2]
    assert isinstance(rows[0][1], BrokenRow)
    assert "duplicate key" in rows[0][1].reason
    assert rows[1][1] == {"context": "c", "question": "w?", "answers": {"text": ["a"]}}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"data": [], "data": [{"paragraphs": []}]}', "has the key `data` twice"),
        ("a.json", '{"data": [{"paragraphs": [], "paragraphs": []}]}', "article 1 has the key `paragraphs` twice"),
        ("a.json", '{"data": [{"paragraphs": [{"context": "", "qas": [], "qas": []}]}]}', "has the key `qas` twice"),
        ("a.json", '{"data": [{"paragraphs": []}]} {"data": []}', "is not JSON: Extra data"),
        ("a.docx", "x", "unknown format"),
        ("a.json", '{"version": "v2.0", "data": [{"paragraphs": [{"qas": []}]}]}', "not in SQuAD's form: no 'context'"),
        ("a.json", '{"data": [1, 2]}', "not in SQuAD's form"),
        ("a.json", '{"data": [{"paragraphs": [', "is not JSON"),
        ("a.json", '"text"', "not a JSON list"),
        ("a.json", "", "not a JSON list"),
        ("a.tsv", "a\ta\n1\t2\n", "`a` appears twice"),
        ("a.parquet", "PAR1 but not really", "not a parquet file"),
        ("a.json", b'[{"a": "caf\xe9"}]', "not UTF-8"),
    ],
)
def test_a_file_of_another_form_is_the_users_mistake(
    tmp_path: Path, name: str, text: str | bytes, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        list(read_rows(write(tmp_path / name, text)))


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([["x"], ["y"]], names=["text", "text"]), path)
    with pytest.raises(UserError, match="column `text` appears twice"):
        list(read_rows(path))


def test_long_cells_of_a_csv_are_read(tmp_path: Path) -> None:
    long = "x" * 300_000
    path = write(tmp_path / "a.csv", f"text\n{long}\n")
    assert [row for _, row in read_rows(path)] == [{"text": long}]
