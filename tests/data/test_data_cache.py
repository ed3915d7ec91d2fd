"""The cache: found again, never out of date, never half there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trietune.data.cache import CacheWriter, make_key, open_cached
from trietune.data.encoder import EncodedExamples
from trietune.data.examples import Example, Message
from trietune.data.load import load_data

EXAMPLES = [
    Example("a:1", "prompt \ud800 ", " completion", answers=("x", "y")),
    Example("a:2", "", "b\n"),
    Example("a:3", "", "c", messages=(Message("user", "u"), Message("assistant", "c"))),
]
ENCODED = EncodedExamples(
    np.array([1, 2, 3, 4, 5, 6], np.int32), np.array([-100, 2, -100, 4, -100, 6], np.int32), np.array([3, 1, 2])
)


def build(folder: Path, key: str = "key") -> None:
    with CacheWriter(folder, key) as writer:
        writer.append(ENCODED, EXAMPLES)
        writer.append(ENCODED, EXAMPLES[:2] + EXAMPLES[:1])
        writer.finish({"note": 1})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    build(tmp_path)
    found = open_cached(tmp_path, "key")
    assert found is not None
    sequences, notes = found
    assert notes == {"note": 1}
    assert sequences.input_ids.tolist() == [1, 2, 3, 4, 5, 6] * 2
    assert sequences.labels.tolist() == [-100, 2, -100, 4, -100, 6] * 2
    assert sequences.offsets.tolist() == [0, 3, 4, 6, 9, 10, 12]
    assert [sequences.examples[i] for i in range(6)] == [*EXAMPLES, *EXAMPLES[:2], EXAMPLES[0]]
    assert list(sequences.ids) == ["a:1", "a:2", "a:3", "a:1", "a:2", "a:1"]
    assert sequences.ids[1:3] == ["a:2", "a:3"]
    assert isinstance(sequences.input_ids, np.memmap)
    with pytest.raises(IndexError):
        sequences.examples[6]


def test_an_empty_entry_is_an_entry(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, "key") as writer:
        writer.finish({})
    found = open_cached(tmp_path, "key")
    assert found is not None
    assert len(found[0]) == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "labels.npy").unlink(),
        lambda folder: (folder / "labels.npy").write_bytes((folder / "labels.npy").read_bytes()[:-4]),
        lambda folder: flip_last_byte(folder / "input_ids.npy"),
        lambda folder: flip_last_byte(folder / "examples.jsonl"),
        lambda folder: (folder / "meta.json").write_text("{"),
        lambda folder: (folder / "meta.json").write_text("[]"),
        lambda folder: (folder / "meta.json").unlink(),
    ],
)
def test_a_damaged_entry_is_none_and_can_be_built_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    build(tmp_path)
    damage(tmp_path / "tokens" / "key")
    assert open_cached(tmp_path, "key") is None
    build(tmp_path)
    assert open_cached(tmp_path, "key") is not None


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with CacheWriter(tmp_path, "key") as writer:
            writer.append(ENCODED, EXAMPLES)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list((tmp_path / "tokens").iterdir()) == []


def test_two_writers_of_one_entry_end_with_one(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, "key") as first, CacheWriter(tmp_path, "key") as second:
        first.append(ENCODED, EXAMPLES)
        second.append(ENCODED, EXAMPLES)
        assert len(first.finish({})) == len(second.finish({})) == 3
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["key"]


def test_what_was_abandoned_long_ago_is_removed(tmp_path: Path) -> None:
    import os

    for name in (".building-old", ".building-new"):
        (tmp_path / "tokens" / name).mkdir(parents=True)
    os.utime(tmp_path / "tokens" / ".building-old", (0, 0))
    build(tmp_path)
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == [".building-new", "key"]


def test_a_key_follows_its_parts() -> None:
    assert make_key(a=1) == make_key(a=1) != make_key(a=2)


@pytest.fixture
def load(tokenizer: Any, make_settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`load(**settings)` tells whether anything was tokenized, and the data's fingerprint."""
    monkeypatch.chdir(tmp_path)

    def call(**changes: Any) -> tuple[bool, str]:
        blocks: list[Any] = []
        data = load_data(
            make_settings(**changes),
            tokenizer,
            cache_folder=tmp_path / "cache",
            report=lambda _: None,
            progress=lambda *event: blocks.append(event),
            check_stop=lambda: None,
        )
        return bool(blocks), data.fingerprint

    return call


def test_the_second_run_starts_from_the_cache(load: Any) -> None:
    Path("t.jsonl").write_text(json.dumps({"prompt": "p", "completion": " c"}) + "\n")
    keys = {"train_file": "t.jsonl", "validation_file": "t.jsonl"}
    was_built, fingerprint = load(**keys)
    assert was_built
    assert load(**keys) == (False, fingerprint)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 100},
        {"overlong": "truncate_prompt"},
        {"max_train_examples": 1},
        {"prompt_template": "{prompt}!", "completion_template": "{completion}"},
        {"dataset_split": "train[:1]"},
    ],
)
def test_whatever_decides_tokens_makes_another_entry(load: Any, changes: Any) -> None:
    Path("t.jsonl").write_text('{"prompt": "p", "completion": " c"}\n' * 2)
    keys = {"train_file": "t.jsonl", "validation_file": "t.jsonl"}
    _, before = load(**keys)
    was_built, after = load(**keys, **changes)
    assert was_built
    assert after != before


def test_another_content_under_the_same_name_is_seen(load: Any) -> None:
    keys = {"train_file": "t.jsonl", "validation_file": "t.jsonl"}
    Path("t.jsonl").write_text('{"prompt": "p", "completion": " c"}\n')
    _, before = load(**keys)
    Path("t.jsonl").write_text('{"prompt": "q", "completion": " c"}\n')
    was_built, after = load(**keys)
    assert was_built
    assert after != before


def test_a_cache_that_cannot_be_written_is_said(
    tokenizer: Any, make_settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.jsonl").write_text('{"prompt": "p", "completion": " c"}\n')
    Path("file").write_text("a file where the cache folder should be")
    said: list[str] = []
    data = load_data(
        make_settings(train_file="t.jsonl", validation_file="t.jsonl"),
        tokenizer,
        cache_folder=Path("file"),
        report=said.append,
        progress=lambda *_: None,
        check_stop=lambda: None,
    )
    assert len(data.train) == 1
    assert any("cannot be written" in line for line in said)
