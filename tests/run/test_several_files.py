"""A run on several files, and the commands after it: each file measured, asked and resumed as what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trietune.cli.app import main

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] + ':' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def mixed(overrides: dict[str, object], tmp_path: Path) -> dict[str, Any]:
    """Keys of a run on chats and on reviews with labels, the chats twice and half of the reviews."""
    turns = [[("user", f"plot {n}?"), ("assistant", f"good {n % 5}")] for n in range(12)]
    chats = [{"messages": [{"role": role, "content": text} for role, text in one]} for one in turns]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    reviews = "".join(f"the film {n},{'good' if n % 2 else 'bad'}\n" for n in range(40))
    (tmp_path / "reviews.csv").write_text("text,label\n" + reviews)
    keys = {key: value for key, value in overrides.items() if key not in ("dataset_id", "validation_file")}
    return {
        **keys,
        "train_file": [str(tmp_path / "chats.jsonl"), str(tmp_path / "reviews.csv")],
        "data_shares": [2, 0.5],
        "prompt_template": "Review: {text}\nOutput:",
        "completion_template": " {label}",
        "chat_template": CHAT_TEMPLATE,
        "max_steps": 2,
    }


def write_config(tmp_path: Path, keys: dict[str, Any]) -> str:
    path = tmp_path / "mixed.yaml"
    path.write_text(json.dumps(keys))
    return str(path)


def test_a_run_on_several_files_is_measured_as_a_whole_and_file_by_file(
    mixed: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, mixed)
    assert main(["train", config, "--dry-run"]) == 0
    plan = capfd.readouterr().out
    assert "chats.jsonl: 11 examples, 22 with a share of 2; 54% of an epoch" in plan
    assert "reviews.csv: 19 of 38 examples, 19 left out by a share of 0.5; 46% of an epoch" in plan
    assert main(["train", config]) == 0
    run = Path(str(mixed["project_dir"])) / str(mixed["wandb_run_name"])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [one for one in records if one.get("event") == "evaluation" and one["when"] == "after"][-1]
    measured = {name for name in last if name.startswith("eval/")}
    assert {"eval/loss", "eval/chats/loss", "eval/reviews/loss", "eval/reviews/accuracy"} <= measured
    assert "eval/accuracy" not in measured
    card = (run / "adapter" / "README.md").read_text()
    assert "Data: `chats.jsonl, reviews.csv` (41 examples)." in card
    assert "datasets:" not in card
    assert "reviews/accuracy" in (run / "report.html").read_text()

    capfd.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["num_examples"] == 3
    for name in ("eval/loss", "eval/chats/loss", "eval/reviews/accuracy"):
        assert found["metrics"][name] == pytest.approx(last[name], rel=1e-4)

    rows = tmp_path / "in.jsonl"
    rows.write_text('{"text": "the film"}\n{"messages": [{"role": "user", "content": "plot?"}]}\n')
    arguments = ["predict", str(run), "--input", str(rows), "--max-new-tokens", "3", "--json"]
    assert main(arguments) == 0
    first, second = json.loads(capfd.readouterr().out)["predictions"]
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(rows.read_text() + json.dumps({"text": ["a", "film"]}) + "\n")
    assert main(["predict", str(run), "--input", str(wrong)]) == 2
    assert f"{wrong}:3 cannot be read: column `text` holds a list" in capfd.readouterr().err
    assert set(first["probabilities"]) == {"good", "bad"}
    assert "text" in second

    for changed in ("data_shares=[2, 1]", f"train_file=[{mixed['train_file'][1]}, {mixed['train_file'][0]}]"):
        longer = ["train", config, "--resume", "--set", "max_steps=3", "--set", changed]
        assert main(longer) == 6
        assert "data_fingerprint" in capfd.readouterr().err
    assert main(["train", config, "--resume", "--set", "max_steps=3"]) == 0


def test_preferences_of_several_files_are_measured_file_by_file(
    overrides: dict[str, object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = {key: value for key, value in overrides.items() if key not in ("dataset_id", "validation_file")}
    files = []
    for name in ("a", "b"):
        rows = [{"prompt": f"{name} {n}", "chosen": " good", "rejected": " bad"} for n in range(20)]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys |= {"train_file": [str(path) for path in files], "objective": "dpo", "max_steps": 1}
    assert main(["train", write_config(tmp_path, keys)]) == 0
    run = Path(str(keys["project_dir"])) / str(keys["wandb_run_name"])
    capfd.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    metrics = json.loads(capfd.readouterr().out)["metrics"]
    assert {"eval/preference_accuracy", "eval/a/preference_accuracy", "eval/b/preference_accuracy"} <= set(metrics)


def test_data_that_is_typed_twice_is_a_list(tmp_path: Path) -> None:
    from trietune.cli.typed_keys import keys_as_set

    a, b = tmp_path / "a.jsonl", tmp_path / "b c.jsonl"
    for path in (a, b):
        path.write_text("{}\n")

    def keys(*values: str) -> dict[str, Any]:
        from trietune.config import load_config

        words = [word for value in values for word in ("--data", value)]
        overrides = keys_as_set(words, {}, command="train")[1::2]
        settings = load_config(None, overrides, environ={})
        return {"train_file": settings.train_file, "dataset_id": settings.dataset_id}

    assert keys(str(a), str(b)) == {"train_file": (str(a), str(b)), "dataset_id": None}
    assert keys("owner/x", "owner/y") == {"train_file": None, "dataset_id": ("owner/x", "owner/y")}
    assert keys(str(a), "owner/x") == {"train_file": None, "dataset_id": (str(a), "owner/x")}
    assert keys("owner/x", str(a)) == {"train_file": None, "dataset_id": ("owner/x", str(a))}


def test_the_chat_template_is_carried_wherever_the_conversations_stand_among_the_files(
    mixed: dict[str, Any], tmp_path: Path
) -> None:
    chats, reviews = mixed["train_file"]
    assert main(["train", write_config(tmp_path, {**mixed, "train_file": [reviews, chats]})]) == 0
    run = Path(str(mixed["project_dir"])) / str(mixed["wandb_run_name"])
    assert main(["export", str(run), str(tmp_path / "merged"), "--merge"]) == 0
    (run / "adapter/chat_template.jinja").unlink()  # as adapters of before have none
    (run / "adapter/manifest.json").unlink()
    assert main(["export", str(run / "adapter"), str(tmp_path / "copy")]) == 0
    for folder in (tmp_path / "merged", tmp_path / "copy"):
        assert (folder / "chat_template.jinja").read_text() == CHAT_TEMPLATE
