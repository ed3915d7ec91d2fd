"""Data of one's own through whole runs and the commands after them: what is learned, measured and written about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from trietune.cli.app import main
from trietune.config import load_config
from trietune.run import saving as keeping

Own = Callable[..., Path]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] + ':' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def own(overrides: dict[str, object], tmp_path: Path) -> Own:
    """`own(**keys)`: a finished run of two steps on 40 rows of `prompt` and `completion`, unless keys say otherwise."""
    rows = [{"prompt": f"the plot {number}:", "completion": f" good {number}"} for number in range(40)]
    data = write_rows(tmp_path / "own.jsonl", rows)

    def train(**keys: Any) -> Path:
        settings = {**overrides, "train_file": str(data), "max_steps": 2, **keys}
        for key in ("validation_file", "dataset_id"):
            if key not in keys:
                del settings[key]
        config = tmp_path / "own.yaml"
        config.write_text(json.dumps(settings))
        assert main(["train", str(config)]) == 0
        return Path(str(overrides["project_dir"])) / str(settings["wandb_run_name"])

    return train


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_on_own_data_is_evaluated_by_the_command_that_it_prints(
    own: Own, capfd: pytest.CaptureFixture[str]
) -> None:
    run = own()
    assert f"trietune evaluate {run}" in capfd.readouterr().out
    assert load_config(run / "config.yaml", environ={}).dataset_id is None
    for arguments in (["evaluate", str(run)], ["evaluate", str(run), "--split", "train"]):
        assert main(arguments) == 0
    assert main(["train", str(run / "config.yaml"), "--dry-run"]) == 0


def test_a_run_whose_configuration_names_a_data_set_that_nobody_wrote_still_opens(
    own: Own,
) -> None:
    run = own()
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("dataset_id: null", "dataset_id: stanfordnlp/sst2"))
    assert load_config(config, environ={}).dataset_id == "stanfordnlp/sst2"
    assert main(["evaluate", str(run)]) == 0
    assert main(["train", str(config), "--dry-run"]) == 0


@pytest.mark.slow
def test_every_row_of_a_file_is_measured_unless_a_split_is_named(
    own: Own, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = own()
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": f"{i}?", "completion": f" {i}"} for i in range(40)])

    def count(*arguments: str) -> int:
        capfd.readouterr()
        assert main(["evaluate", *arguments, "--set", "dtype=float32", "--json"]) == 0
        return int(json.loads(capfd.readouterr().out)["num_examples"])

    for target in (run, run / "adapter"):
        assert count(str(target), "--dataset", str(other)) == 40
        assert count(str(target), "--dataset", str(other), "--split", "validation") == 2
        assert count(str(target), "--dataset", str(other), "--split", "train") == 38
        assert count(str(target), "--set", f"validation_file={other}") == 40
    assert count(str(run)) == 2
    (tmp_path / "splits").mkdir()
    write_rows(tmp_path / "splits/train.jsonl", [{"prompt": "a", "completion": " b"}] * 9)
    write_rows(tmp_path / "splits/valid.jsonl", [{"prompt": "a", "completion": " b"}] * 3)
    assert count(str(run / "adapter"), "--dataset", str(tmp_path / "splits")) == 3
    two = write_rows(tmp_path / "two.jsonl", [{"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": " d"}])
    losses = []
    for split in ("train", "validation"):
        assert main(["evaluate", str(run), "--dataset", str(two), "--split", split, "--json"]) == 0
        losses.append(json.loads(capfd.readouterr().out)["metrics"]["eval/loss"])
    assert losses[0] != losses[1]


def test_an_adapter_is_evaluated_in_the_words_that_it_was_trained_with(
    own: Own, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "moods.csv"
    table.write_text("The film (1-5),its mood\n" + "".join(f"plot {one},good {one}\n" for one in range(20)))
    templates = {"prompt_template": "Film: {The film (1-5)}\nMood:", "completion_template": " {its mood}"}
    run = own(train_file=str(table), **templates)
    asked = write_rows(tmp_path / "asked.jsonl", [{"The film (1-5)": "plot 3"}])
    assert main(["predict", str(run), "--input", str(asked)]) == 0
    assert main(["predict", str(run), "--text", "plot 3"]) == 0
    wrong = write_rows(tmp_path / "wrong.jsonl", [{"The film": "plot 3"}])
    assert main(["predict", str(run), "--input", str(wrong)]) == 2
    capfd.readouterr()
    arguments = ["--dataset", str(table), "--set", "dtype=float32", "--json"]
    assert main(["evaluate", str(run / "adapter"), *arguments]) == 0
    alone = json.loads(capfd.readouterr().out)
    assert main(["evaluate", str(run), *arguments]) == 0
    assert json.loads(capfd.readouterr().out)["metrics"] == alone["metrics"]
    assert alone["num_examples"] == 20


def test_the_card_of_own_data_claims_no_data_set_and_shows_none_of_its_texts(own: Own, tmp_path: Path) -> None:
    own_text = "the plot"
    run = own()
    assert main(["export", str(run), str(tmp_path / "merged"), "--merge"]) == 0
    for folder in (run / "adapter", tmp_path / "merged"):
        card = (folder / "README.md").read_text()
        assert "sst2" not in card
        assert "model-index" not in card
        assert own_text not in card
        assert "prompt = '{prompt}'" in card
        assert "Data: `own.jsonl` (38 examples)." in card
    asked = own(card_example=True, wandb_run_name="asked")
    assert own_text in (asked / "adapter/README.md").read_text()
    chats = [
        {"messages": [{"role": "user", "content": f"my secret {i}"}, {"role": "assistant", "content": f"yes {i}"}]}
        for i in range(20)
    ]
    data = write_rows(tmp_path / "chats.jsonl", chats)
    chat = own(train_file=str(data), chat_template=CHAT_TEMPLATE, wandb_run_name="chat")
    card = (chat / "adapter/README.md").read_text()
    assert "secret" not in card
    assert "prompt = 'u:{user message}\\na:'" in card
    table = tmp_path / "films.csv"
    table.write_text("film,mood\n" + "".join(f"secret {number},good {number}\n" for number in range(20)))
    templates = {"prompt_template": "Film: {film}\nMood:", "completion_template": " {mood}"}
    templated = own(train_file=str(table), wandb_run_name="templated", **templates)
    card = (templated / "adapter/README.md").read_text()
    assert "secret" not in card
    assert "prompt = 'Film: {film}\\nMood:'" in card


@pytest.mark.parametrize("says_it", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_longer_run_does_not_restart_the_warm_up(
    own: Own, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, says_it: bool
) -> None:
    keys = {"warmup_ratio": 0.5, "max_steps": None, "num_epochs": 1, "save_optim": True}
    files_of = keeping.RunFiles._checkpoint_files

    def files_of_before(*arguments: Any) -> Any:
        files = files_of(*arguments)
        state = {key: value for key, value in json.loads(files["trainer_state.json"]).items() if "warmup" not in key}
        return {**files, "trainer_state.json": json.dumps(state).encode()}

    if not says_it:
        monkeypatch.setattr(keeping.RunFiles, "_checkpoint_files", files_of_before)
    run = own(**keys)  # 38 examples in batches of 8: 5 steps, 3 of them warm-up
    [checkpoint] = (run / "checkpoints").glob("step-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state.get("num_warmup_steps") == (3 if says_it else None)
    config = tmp_path / "own.yaml"
    longer = ["train", str(config), "--set", "num_epochs=8", "--resume"]
    capfd.readouterr()
    assert main(longer) == 6
    err = capfd.readouterr().err
    assert "warm-up in effect  3 steps     20 steps" in err
    assert "`--allow-change num_epochs`" in err
    assert main([*longer, "--allow-change", "num_epochs"]) == 0
    assert "warm-up in effect" in capfd.readouterr().err
    (run / "adapter").rename(tmp_path / "elsewhere")
    same = ["train", str(config), "--set", "num_epochs=16", "--set", "warmup_ratio=0.25", "--resume"]
    assert main(same) == 6
    assert "warm-up" not in capfd.readouterr().err


@pytest.mark.slow
def test_what_is_exported_carries_the_chat_template_that_was_trained_with(
    own: Own, tmp_path: Path, tiny_model: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "the base's own"}))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = write_rows(tmp_path / "chats.jsonl", [{"messages": turns}] * 20)
    run = own(model_name=str(base), train_file=str(data), chat_template=CHAT_TEMPLATE)
    assert main(["verify", str(run)]) == 0
    assert main(["export", str(run), str(tmp_path / "copy")]) == 0
    assert main(["export", str(run), str(tmp_path / "merged"), "--merge"]) == 0
    for folder in (run / "adapter", tmp_path / "copy", tmp_path / "merged"):
        assert (folder / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == CHAT_TEMPLATE
    (run / "adapter/chat_template.jinja").unlink()  # as adapters of before have none
    (run / "adapter/manifest.json").unlink()
    assert main(["export", str(run / "adapter"), str(tmp_path / "again"), "--merge"]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == CHAT_TEMPLATE
    plain = own(wandb_run_name="plain")
    assert not (plain / "adapter/chat_template.jinja").exists()


def test_a_file_of_inputs_is_read_as_the_run_reads_its_own(
    own: Own, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "films.csv"
    table.write_bytes(b"film;mood\n" + "".join(f"café {n};good {n}\n" for n in range(20)).encode("cp1252"))
    templates = {"prompt_template": "Film: {film}\nMood:", "completion_template": " {mood}"}
    run = own(train_file=str(table), csv_separator=";", file_encoding="cp1252", **templates)
    capfd.readouterr()
    assert main(["predict", str(run), "--input", str(table), "--output", "-", "--max-new-tokens", "2"]) == 0
    records = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [record["input"]["film"] for record in records] == [f"café {n}" for n in range(20)]
    # An adapter by itself says of no file how it is written; that no row can be read is not that a column is missing.
    adapter = ["evaluate", str(run / "adapter"), "--dataset", str(table), "--set", "csv_separator=;"]
    assert main(adapter) == 2
    assert "no row of `films.csv` can be read" in (error := capfd.readouterr().err)
    assert "with `file_encoding: cp1252`" in error
    assert main([*adapter, "--set", "file_encoding=cp1252", "--set", "dtype=float32"]) == 0
    asked = write_rows(tmp_path / "asked.jsonl", [{"film": "a"}, {"film": ["b"]}])
    asked.write_text(asked.read_text().replace("\n", "\n\n"))
    assert main(["predict", str(run), "--input", str(asked)]) == 2
    assert f"{asked}:3 cannot be read: column `film` holds a list" in capfd.readouterr().err
