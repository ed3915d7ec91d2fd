"""A run whose token cache is cut short while it trains saves what it has learned and says what happened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from trietune import load_config, train
from trietune.tracking.events import Event, StepFinished
from trietune.tracking.open import open_tracker


class Cutter:
    """Cuts every file of the token cache after the second step."""

    name = "cutter"

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.cut: list[Path] = []

    def handle(self, event: Event) -> None:
        if isinstance(event, StepFinished) and event.step == 2:
            for path in self.cache.glob("data/tokens/*/*.npy"):
                self.cut.append(path)
                os.truncate(path, 64)

    def close(self) -> None:
        pass


@pytest.mark.slow
def test_a_run_whose_cache_is_cut_short_saves_and_says_so(overrides: dict[str, Any], tmp_path: Path) -> None:
    cutter = Cutter(tmp_path / "cache")
    tracker = open_tracker(tracker="none")
    tracker.add(cutter)
    run = train(load_config(overrides={**overrides, "steps_freq": 100, "val_steps_freq": 100}), tracker=tracker)
    assert cutter.cut
    assert (run.status, run.exit_code) == ("stopped", 2)
    assert run.step in (2, 3)  # the batch of step 3 may have been read before
    assert [path.name for path in (run.directory / "checkpoints").iterdir()] == [f"step-{run.step:08}"]
    assert "cut short while it was read" in (run.directory / "metrics.jsonl").read_text()
