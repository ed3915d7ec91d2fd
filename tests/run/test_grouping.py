"""Groups of a large data set are kept in the cache, found there, and made again when the file is damaged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from strategies import question_batch
from trietune.run import grouping
from trietune.run.grouping import find_groups
from trietune.trie import groups as groups_module


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(grouping, "KEPT_FROM_EXAMPLES", 10)
    sequences = question_batch(np.random.default_rng(1), vocabulary=50, paragraphs=6)
    return SimpleNamespace(train=sequences, train_fingerprint="a" * 40)


@pytest.fixture
def sorts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes for which groups were really found."""
    found: list[int] = []
    find = groups_module.find_prefix_groups

    def count(sequences: Any, *, batch_size: int) -> Any:
        found.append(batch_size)
        return find(sequences, batch_size=batch_size)

    monkeypatch.setattr(grouping, "find_prefix_groups", count)
    return found


def kept_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_groups_are_found_once(data: Any, sorts: list[int], tmp_path: Path) -> None:
    first, second = (find_groups(data, data.train, 8, tmp_path) for _ in range(2))
    assert sorts == [8]
    np.testing.assert_array_equal(first.order, second.order)
    np.testing.assert_array_equal(first.start, second.start)
    assert (first.num_tokens, first.num_distinct) == (second.num_tokens, second.num_distinct)


def test_other_data_or_batches_have_groups_of_their_own(data: Any, sorts: list[int], tmp_path: Path) -> None:
    find_groups(data, data.train, 8, tmp_path)
    find_groups(data, data.train, 4, tmp_path)
    data.train_fingerprint = "b" * 40
    find_groups(data, data.train, 4, tmp_path)
    assert sorts == [8, 4, 4]
    assert len(kept_files(tmp_path)) == 3


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_file_is_made_anew(data: Any, sorts: list[int], tmp_path: Path, damage: str) -> None:
    whole = find_groups(data, data.train, 8, tmp_path)
    [path] = kept_files(tmp_path)
    content = bytearray(path.read_bytes())
    content[200] ^= 1  # within the first array
    path.write_bytes({"flipped": bytes(content), "cut": path.read_bytes()[:-40], "empty": b""}[damage])
    np.testing.assert_array_equal(find_groups(data, data.train, 8, tmp_path).order, whole.order)
    assert sorts == [8, 8]
    assert find_groups(data, data.train, 8, tmp_path) is not None
    assert sorts == [8, 8]


def test_few_examples_are_not_kept(data: Any, sorts: list[int], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(grouping, "KEPT_FROM_EXAMPLES", 10**6)
    find_groups(data, data.train, 8, tmp_path)
    assert kept_files(tmp_path) == []


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(data: Any, sorts: list[int], tmp_path: Path) -> None:
    (tmp_path / "groups").write_text("in the way")
    assert len(find_groups(data, data.train, 8, tmp_path).order) == len(data.train)
    assert len(find_groups(data, data.train, 8, tmp_path).order) == len(data.train)
    assert sorts == [8, 8]
