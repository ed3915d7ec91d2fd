"""Memory stays bounded, whatever the size of a file."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trietune.config import Settings
from trietune.data import load_data
from trietune.data.encode_rows import ROWS_PER_BLOCK

# A row more costs its 8-byte hash, its place in a sort of those, and nothing else; the text alone would be 30 times it.
BYTES_PER_ROW = 64


def peak_bytes(path: Path, num_rows: int, tokenizer: Any, settings: Settings) -> int:
    """The most that Python and NumPy hold at once while a file of so many rows is made into tokens."""
    with path.open("w") as file:
        for number in range(num_rows):
            row = {"prompt": f"{number} " + "a fine film " * 15, "completion": f" {number}"}
            file.write(json.dumps(row) + "\n")
    tracemalloc.start()
    try:
        data = load_data(
            settings,
            tokenizer,
            cache_folder=path.parent / "cache",
            report=lambda line: None,
            progress=lambda *event: None,
            check_stop=lambda: None,
        )
        assert len(data.train) == num_rows
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_a_file_is_never_held_as_a_whole(
    tokenizer: Any, make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    (tmp_path / "dev.jsonl").write_text('{"prompt": "p", "completion": " c"}\n')
    peaks = {}
    for num_blocks in (1, 2, 6):
        path = tmp_path / f"{num_blocks}.jsonl"
        settings = make_settings(train_file=str(path), validation_file=str(tmp_path / "dev.jsonl"))
        peaks[num_blocks] = peak_bytes(path, num_blocks * ROWS_PER_BLOCK, tokenizer, settings)
    assert peaks[6] - peaks[2] < 4 * ROWS_PER_BLOCK * BYTES_PER_ROW, peaks
