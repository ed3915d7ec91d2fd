"""A configuration of a million layers is refused before anything is built, so a signal is answered."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tiny_model import write_tiny_model
from trietune.errors import UserError
from trietune.model.base.folder import MOST_LAYERS
from trietune.model.base.locate import locate_model

MILLION = 10**6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": MILLION},
        {"num_hidden_layers": MOST_LAYERS + 1},
        {"n_layer": MILLION},
        {"layer_types": ["full_attention"] * 2_000},
        {"text_config": {"num_hidden_layers": MILLION}},
        {"a": {"b": {"decoder_layers": MILLION}}},
        {"num_local_experts": MILLION},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_million_parts_are_refused_at_once(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    begun = time.process_time()
    with pytest.raises(UserError, match="parts of a network"):
        locate_model(str(folder))
    assert time.process_time() - begun < 10  # building them takes minutes
