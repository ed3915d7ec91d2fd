"""The sample preferences are what their README says, and `trietune train --set objective=dpo` would run on them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from trietune import UserError
from trietune.cli import main
from trietune.config.load import load_config
from trietune.demo.locations import demo_config, demo_preferences

ROOT = Path(__file__).parents[2]


def read(name: str) -> list[tuple[str, str, str]]:
    rows = [json.loads(line) for line in (demo_preferences() / name).read_text("utf-8").splitlines()]
    assert all(row.keys() == {"prompt", "chosen", "rejected"} for row in rows)
    assert all([m["role"] for key in row for m in row[key]] == ["user", "assistant", "assistant"] for row in rows)
    return [(row["prompt"][0]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]


def test_there_are_two_hundred_pairs_and_no_two_are_alike() -> None:
    train, valid = read("train.jsonl"), read("valid.jsonl")
    assert (len(train), len(valid)) == (160, 40)
    prompts = Counter(prompt for prompt, _, _ in train + valid)
    assert max(prompts.values()) == 1
    assert all(chosen != rejected for _, chosen, rejected in train + valid)
    beginnings = Counter(" ".join(chosen.split()[:4]) for _, chosen, _ in train + valid)
    assert max(beginnings.values()) <= 2  # no templates


@pytest.mark.parametrize("objective", ["dpo", "ipo", "simpo", "orpo", "kto"])
def test_a_preference_objective_alone_runs_on_the_sample_preferences(
    objective: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main(["train", "--set", f"objective={objective}", "--show-config"]) == 0
    shown = capsys.readouterr().out
    assert 'dataset_id: "demo/preferences"' in shown
    assert f'objective: "{objective}"' in shown


def test_data_that_is_named_stays_what_is_trained_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--set", "objective=dpo", "--set", "train_file=mine.jsonl", "--show-config"]) == 0
    shown = capsys.readouterr().out
    assert 'train_file: "mine.jsonl"' in shown
    assert "demo/preferences" not in shown


def test_ranking_stays_with_the_film_reviews(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--set", "objective=rank", "--show-config"]) == 0
    assert 'dataset_id: "demo/film_reviews"' in capsys.readouterr().out


def test_the_configuration_of_the_preferences_loads() -> None:
    settings = load_config(demo_config(learns_preferences=True), environ={})
    assert settings.objective == "dpo"
    assert not settings.notes


def test_film_reviews_hold_no_preferences(tmp_path: Path) -> None:
    from trietune.data.preferences import choose_form

    with pytest.raises(UserError, match="holds none"):
        choose_form(["sentence", "label"], {}, objective="dpo", prompt_template=None, source="train.tsv")
