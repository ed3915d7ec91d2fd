"""What the caches hold, what is removed, and which run a mistyped one was."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from trietune import UserError
from trietune.cli.app import main
from trietune.io.cache_folder import mark_used
from trietune.io.run_folders import is_mistyped_run, nearest_runs, which_run
from trietune.run.caches import SECONDS_PER_DAY, list_cache
from trietune.run.opened import open_model
from trietune.tracking.tracker import Tracker


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two entries of tokens, one of them old, a converted model, and an entry under way."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRIETUNE_CACHE", str(folder))
    for name in ("data/tokens/old", "data/tokens/new", "gguf/model", "data/tokens/.building"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_bytes(b"x" * 1000)
    notes = {"source": "rows.jsonl", "kept": 1234}
    (folder / "data/tokens/new/meta.json").write_text(json.dumps({"files": {}, "notes": notes}))
    long_ago = time.time() - 31 * SECONDS_PER_DAY
    for path in (folder / "data/tokens/old/file", folder / "data/tokens/old"):
        os.utime(path, (long_ago, long_ago))
    return folder


def test_the_cache_is_listed_with_sizes_uses_and_users(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["cache"]) == 0
    out = capfd.readouterr().out
    for part in (
        "31 days ago",
        "today",
        "rows.jsonl, 1,234 examples",
        "a converted GGUF file",
        "3 entries",
        str(cache),
    ):
        assert part in out
    assert main(["cache", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert {Path(entry["path"]).name for entry in document["entries"]} == {"old", "new", "model"}
    assert (cache / "data/tokens/old").is_dir()


def test_what_nothing_used_for_a_month_is_removed(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--prune"]) == 0
    assert "removed: 1 entries" in capfd.readouterr().out
    left = {entry.path.name for entry in list_cache()}
    assert left == {"new", "model"}
    assert (cache / "data/tokens/.building").is_dir()
    assert main(["cache", "--prune", "--days", "0"]) == 0
    assert list_cache() == []


def test_a_use_keeps_an_entry(cache: Path) -> None:
    mark_used(cache / "data/tokens/old")
    mark_used(cache / "nowhere")
    assert main(["cache", "--prune"]) == 0
    assert (cache / "data/tokens/old").is_dir()


def test_an_empty_cache_is_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIETUNE_CACHE", str(tmp_path / "nothing"))
    assert main(["cache", "--prune"]) == 0


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("film-reviews", "film-reviews-2", "tickets"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("seed: 1\n")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("runs/flim-reviews", "runs/film-reviews"),
        ("runs/tikets", "runs/tickets"),
        ("tickets", "runs/tickets"),
        ("run/tickets", "runs/tickets"),
        ("runs/film-reviews-3", "runs/film-reviews"),
    ],
)
def test_a_mistyped_run_is_answered_with_the_nearest(runs: Path, typed: str, meant: str) -> None:
    assert is_mistyped_run(Path(typed))
    assert Path(meant) in nearest_runs(Path(typed))
    with pytest.raises(UserError, match="there is no run") as caught:
        open_model(typed, (), Tracker())
    assert f"`{meant}`" in str(caught.value.next_step)
    for command in ("checkpoints", "verify", "sync", "report"):
        assert main([command, typed]) == 2


@pytest.mark.parametrize("typed", ["google/gemma-1.1-2b-it", "gpt2", "owner/tickets", "runs/tickets"])
def test_what_may_be_a_model_is_looked_up(runs: Path, typed: str) -> None:
    assert not is_mistyped_run(Path(typed)) or typed == "owner/tickets"


def test_without_a_near_one_runs_are_listed(runs: Path) -> None:
    assert is_mistyped_run(Path("runs/zzz"))
    assert which_run(Path("runs/zzz")) == "name a run's folder: runs/film-reviews, runs/film-reviews-2, runs/tickets"
