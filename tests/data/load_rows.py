"""Rows as a file that a run is given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trietune.config import load_config
from trietune.data.load import load_data
from trietune.data.loaded_data import Data


def load_rows(rows: Sequence[Any], tokenizer: Any, folder: Path, **changes: Any) -> tuple[Data, list[str]]:
    """The data of these rows, and what was said about them; `changes` are keys of the configuration."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines: list[str] = []
    data = load_data(
        load_config(overrides={"train_file": str(file), "max_length": 512, **changes}, environ={}),
        tokenizer,
        cache_folder=folder / "cache",
        report=lines.append,
        progress=lambda phase, done, total: None,
        check_stop=lambda: None,
    )
    return data, lines
