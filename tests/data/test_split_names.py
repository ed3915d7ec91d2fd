"""Which files of a folder are for training: by their names, said where that is not plain."""

from __future__ import annotations

from pathlib import Path

import pytest

from trietune.data.folders import local_splits
from trietune.data.rows import FileRows
from trietune.errors import UserError


def splits_of(folder: Path, *names: str) -> tuple[dict[str, list[str]], str]:
    """The files of each split of a folder with files of these names, and what was said about them."""
    for name in names:
        (folder / name).write_text('{"prompt": "a", "completion": "b"}\n')
    said: list[str] = []
    found = local_splits(str(folder), "train_file", said.append)
    files = {name: [path.name for path in rows.paths] for name, rows in found.items() if isinstance(rows, FileRows)}
    return files, "\n".join(said)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("films_train.jsonl", "films_val.jsonl"), {"train": ["films_train.jsonl"], "val": ["films_val.jsonl"]}),
        (("data.jsonl", "data-test.jsonl"), {"train": ["data.jsonl"], "test": ["data-test.jsonl"]}),
        (("x.dev.jsonl", "x.TRAIN.jsonl"), {"train": ["x.TRAIN.jsonl"], "dev": ["x.dev.jsonl"]}),
        (("my_test.jsonl",), {"test": ["my_test.jsonl"]}),
        (("a_train_1.jsonl", "a_train_2.jsonl"), {"train": ["a_train_1.jsonl", "a_train_2.jsonl"]}),
        (("attest.jsonl", "b.jsonl"), {"train": ["attest.jsonl", "b.jsonl"]}),
    ],
)
def test_a_name_that_ends_with_a_split_is_that_split(
    names: tuple[str, ...], expected: dict[str, list[str]], tmp_path: Path
) -> None:
    found, said = splits_of(tmp_path, *names)
    assert found == expected
    if expected.keys() != {"train"}:
        assert all(f"the split `{name}` of `{tmp_path}` is `{files[0]}`" in said for name, files in expected.items())


def test_names_that_could_all_be_one_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"several files could be the split `test`: `a_test\.jsonl`, `b_test\.jsonl`"):
        splits_of(tmp_path, "c.jsonl", "a_test.jsonl", "b_test.jsonl")


def test_files_that_nothing_reads_are_named(tmp_path: Path) -> None:
    _, said = splits_of(tmp_path, "train.jsonl", "valid.jsonl", "dev.jsonl", "more.jsonl", "readme.txt")
    assert said == f"not read, of the files in `{tmp_path}`: `dev.jsonl`, `more.jsonl`"
