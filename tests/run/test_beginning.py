"""`add_bos`: a run goes on as it began, whatever `auto` meant when it did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import trietune
from trietune import UserError
from trietune.data import encoder, prompt_formats
from trietune.tracking.tracker import Tracker

Settings = dict[str, object]


def start(settings: Settings) -> trietune.Run:
    return trietune.train(trietune.load_config(None, settings), tracker=Tracker())


def beginning(run: trietune.Run) -> int | None:
    found: int | None = json.loads((run.directory / "adapter" / "prompt_format.json").read_text())["bos_id"]
    return found


@pytest.fixture
def settings(overrides: Settings) -> Settings:
    return {**overrides, "max_steps": 4, "save_strategy": "step", "steps_freq": 2, "self_check": False}


@pytest.fixture
def of_the_first_rule(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> trietune.Run:
    """Two steps of four, under `add_bos: auto`, when that meant: wherever there is such a token."""

    def find_first(tokenizer: Any, add_bos: object = "auto") -> int | None:
        return encoder._bos_id_as_first_hashed(tokenizer) if add_bos == "auto" else None

    with monkeypatch.context() as patch:
        patch.setattr(prompt_formats, "find_bos_id", find_first)
        run = start({**settings, "max_steps": 2})
    assert beginning(run) is not None
    shutil.rmtree(run.directory / "adapter")
    return run


def test_auto_begins_texts_as_the_tokenizer_does(settings: Settings) -> None:
    assert beginning(start(settings)) is None  # the tokenizer of these tests has the token, and adds none


@pytest.mark.parametrize("add_bos", ["auto", True])
def test_a_run_goes_on_as_it_began(of_the_first_rule: trietune.Run, settings: Settings, add_bos: object) -> None:
    began = json.loads(next((of_the_first_rule.directory / "checkpoints").glob("*/prompt_format.json")).read_text())
    run = start({**settings, "add_bos": add_bos, "resume_from_checkpoint": True})
    assert (run.step, beginning(run)) == (4, began["bos_id"])


def test_another_beginning_is_refused(of_the_first_rule: trietune.Run, settings: Settings) -> None:
    with pytest.raises(UserError, match=r"add_bos +True +False") as caught:
        start({**settings, "add_bos": False, "resume_from_checkpoint": True})
    assert caught.value.exit_code == 6
    assert "--allow-change add_bos" in str(caught.value)


def test_a_new_run_in_the_place_of_an_old_one_follows_today_s_rule(
    of_the_first_rule: trietune.Run, settings: Settings, tmp_path: Path
) -> None:
    assert beginning(start({**settings, "project_dir": str(tmp_path / "elsewhere")})) is None


def test_where_nothing_can_be_read_the_checkpoint_decides(
    of_the_first_rule: trietune.Run, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when checkpoints come from a storage after the data was read."""
    from trietune.run import planning

    monkeypatch.setattr(planning, "begins_with_bos", lambda directory: None)
    with pytest.raises(UserError, match=r"add_bos +True +False"):
        start({**settings, "resume_from_checkpoint": True})
