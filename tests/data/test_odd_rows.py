"""Rows that once ended a run as a bug of ours: each is said with its place, with exit code 2."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tiny_model import write_tiny_model
from trietune.config import load_config
from trietune.data.encoder import load_tokenizer
from trietune.data.files import read_rows
from trietune.data.load import load_data
from trietune.errors import UserError

HUGE = 10**400


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model")))


def load(path: Path, tokenizer: Any, **keys: Any) -> Any:
    settings = load_config(overrides={"train_file": str(path), "max_length": 64, **keys}, environ={})
    return load_data(
        settings,
        tokenizer,
        cache_folder=path.parent / "cache",
        report=lambda text: None,
        progress=lambda phase, done, total: None,
        check_stop=lambda: None,
    )


@pytest.mark.parametrize(
    ("row", "keys", "reason"),
    [
        ({"sentence": "a", "label": [1]}, {"dataset_id": "sst2"}, "label is a list"),
        ({"sentence": "a", "label": {"x": 1}}, {"dataset_id": "sst2"}, "label is a dict"),
        ({"prompt": "a", "completion": "b", "weight": HUGE}, {}, "not a number"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": HUGE}]},
            {},
            "not a number",
        ),
        ({"prompt": "a", "chosen": "\ud83d", "rejected": "b"}, {"objective": "dpo"}, "half a character"),
        ({"prompt": "\ud83d", "chosen": "a", "rejected": "b"}, {"objective": "dpo"}, "half a character"),
        ({"prompt": "a", "completions": ["a", "b"], "scores": [HUGE, 1]}, {"objective": "dpo"}, "list of numbers"),
    ],
)
def test_a_row_of_another_kind_is_named(
    row: dict[str, Any], keys: dict[str, Any], reason: str, tokenizer: Any, tmp_path: Path
) -> None:
    good = json.loads(json.dumps(row).replace("\\ud83d", "c").replace(str(HUGE), "2"))
    if "sentence" in good:
        good["label"] = 1
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(one) + "\n" for one in (good, row)))
    with pytest.raises(UserError) as refused:
        load(rows, tokenizer, **keys)
    assert refused.value.exit_code == 2
    assert reason in str(refused.value)
    assert "rows.jsonl:2" in str(refused.value)


def test_a_parquet_file_with_a_damaged_page_is_named(tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    table = pa.table({"prompt": [f"text {number}" for number in range(500)], "completion": ["a", "b"] * 250})
    pq.write_table(table, path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[40:80] = bytes(40)
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="not a parquet file that can be read") as refused:
        load(path, tokenizer)
    assert "rows.parquet" in str(refused.value.where)


def test_a_parquet_object_with_a_field_twice_is_named(tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    twice = pa.StructArray.from_arrays([pa.array(["a", "b"]), pa.array(["c", "d"])], names=["z", "z"])
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": ["a", "b"], "more": twice}), path)
    with pytest.raises(UserError, match=r"rows\.parquet"):
        load(path, tokenizer)


def write_arrow(path: Path, num_rows: int = 4000) -> None:
    import pyarrow as pa

    table = pa.table({"prompt": [f"text {number}" for number in range(num_rows)], "completion": ["a"] * num_rows})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)


def test_an_arrow_file_that_is_cut_short_while_it_is_read_ends_no_process(tmp_path: Path) -> None:
    import pyarrow as pa

    path = tmp_path / "rows.arrow"

    def ends(read: Any) -> int:
        write_arrow(path)
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            rows = iter(read())
            next(rows)
            os.truncate(path, 16_384)
            try:
                for _ in rows:
                    pass
            except UserError as error:
                os._exit(error.exit_code if "rows.arrow" in str(error) else 99)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def mapped() -> Any:
        return (row for batch in pa.ipc.open_stream(pa.memory_map(str(path))) for row in batch.to_pylist())

    assert ends(mapped) == -signal.SIGBUS, "the fault did not happen"
    assert ends(lambda: read_rows(path)) == 2


def test_arrow_text_that_is_not_utf8_is_named(tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow as pa

    ends = pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0")
    broken = pa.Array.from_buffers(pa.string(), 2, [None, ends, pa.py_buffer(b"ok\xff\xfe")])
    table = pa.table({"prompt": broken, "completion": ["a", "b"]})
    path = tmp_path / "rows.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="not an arrow file that can be read: 'utf-8' codec") as refused:
        load(path, tokenizer)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("encoding", ["ascii", "utf-32", "punycode", "utf-16"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.json", "rows.txt"])
def test_a_file_of_another_encoding_is_named(encoding: str, name: str, tokenizer: Any, tmp_path: Path) -> None:
    texts = {
        "csv": "prompt,completion\na,b\n\u00e9,d\n", "tsv": "prompt\tcompletion\na\tb\n\u00e9\td\n",
        "jsonl": '{"prompt": "a", "completion": "\u00e9"}\n', "json": '[{"prompt": "a", "completion": "\u00e9"}]',
        "txt": "a line\n\u00e9\n",
    }  # fmt: skip
    path = tmp_path / name
    path.write_text(texts[name.partition(".")[2]], "utf-8")
    with pytest.raises(UnicodeError):
        path.read_text(encoding)
    with pytest.raises(UserError, match=rf"`{name}` is not {encoding} text") as refused:
        load(path, tokenizer, file_encoding=encoding)
    assert refused.value.exit_code == 2


def test_what_is_there_but_no_file_is_called_what_it_is(tokenizer: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to("nowhere")
    for name, kind in (("pipe.jsonl", "is a pipe"), ("link.jsonl", "is a link to `nowhere`")):
        with pytest.raises(UserError, match=kind) as refused:
            load(tmp_path / name, tokenizer)
        assert "did you mean" not in str(refused.value)


def test_fifty_thousand_columns_are_looked_through_once(tokenizer: Any, tmp_path: Path) -> None:
    class Counted(str):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Counted.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    from trietune.data.table_files import _check_columns

    _check_columns([Counted(f"c{number}") for number in range(20_000)], tmp_path / "rows.csv")
    assert Counted.compared < 200_000


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_impossible": "false"}, "`is_impossible` is `false`, neither true nor false"),
        ({"is_impossible": [True]}, "neither true nor false"),
    ],
)
def test_a_question_of_which_it_is_not_clear_whether_it_has_an_answer_is_named(
    changes: dict[str, Any], reason: str, tokenizer: Any, tmp_path: Path
) -> None:
    good = {"id": "1", "question": "what?", "answers": [{"text": "b", "answer_start": 2}], "is_impossible": False}
    questions = [good, {**good, "id": "2", "is_impossible": True, "answers": []}, {**good, "id": "3", **changes}]
    file = tmp_path / "squad.json"
    for qas in (questions[:2], questions):
        file.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "a b c", "qas": qas}]}]}))
        if len(qas) == 2:
            assert load(file, tokenizer).counts.train.kept == 1
            continue
        with pytest.raises(UserError) as refused:
            load(file, tokenizer)
        assert "squad.json question 3: " in str(refused.value)
        assert reason in str(refused.value)
