"""Data that does not fit into its model: told before a run's folder is made, in every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from trietune.cli.app import main
from trietune.errors import UserError
from trietune.run.fitting import check_ids, check_positions


@pytest.fixture
def train(overrides: dict[str, object], tmp_path: Path) -> Any:
    """`train(rows, **keys)`: the exit code of a run on these rows."""

    def call(rows: list[Any], **keys: Any) -> int:
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {**overrides, "train_file": str(data), "dataset_id": None, "validation_file": None, **keys}
        return main(
            ["train", *(part for key, value in settings.items() for part in ("--set", f"{key}={as_yaml(value)}"))]
        )

    return call


def as_yaml(value: Any) -> str:
    return "null" if value is None else value if isinstance(value, str) else json.dumps(value)


def test_a_tokenizer_with_more_tokens_than_the_model_is_told_before_anything_is_written(
    train: Any, tiny_model: Path, tmp_path: Path, overrides: dict[str, object], capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    size = len(tokenizer)
    tokenizer.add_tokens(["wonderful"])
    tokenizer.save_pretrained(model)
    rows = [{"prompt": "the film is", "completion": " good"}] * 20
    assert train(rows, model_name=str(model)) == 0
    run = Path(str(overrides["project_dir"])) / "run"
    capfd.readouterr()
    assert train([*rows, {"prompt": "the film", "completion": " wonderful"}], model_name=str(model)) == 2
    err = capfd.readouterr().err
    assert f"token {size} is not in this model, which has {size} tokens" in err
    assert "data.jsonl:21" in err
    assert not run.with_name("run-2").exists()
    tokens = [{"input_ids": [5, 6, size], "labels": [5, 6, -100]}] * 5
    assert train(tokens, model_name=str(model)) == 2
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"prompt": "wonderful", "completion": " good"}) + "\n")
    assert main(["evaluate", str(run), "--dataset", str(asked)]) == 2
    assert main(["predict", str(run), "--text", "wonderful"]) == 2
    assert "bug in TrieTune" not in capfd.readouterr().err


def test_positions_that_a_model_does_not_have_are_told(
    train: Any, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "opt"
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = OPTConfig(
        vocab_size=400, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=1, ffn_dim=64, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    OPTForCausalLM(config).save_pretrained(model)
    keys = {"model_name": str(model), "batching": "padded", "max_steps": 1}
    short, long = ({"prompt": "a film", "completion": " good" * number} for number in (2, 30))
    assert train([short] * 20 + [long], **keys) == 2
    assert "this model has 16 positions" in capfd.readouterr().err


def test_more_positions_than_a_model_was_made_for_are_told() -> None:
    said: list[str] = []
    check_positions(512, 512, are_learnt=False, report=said.append)
    check_positions(513, None, are_learnt=True, report=said.append)
    assert not said
    check_positions(513, 512, are_learnt=False, report=said.append)
    assert "513 tokens, and this model was made for at most 512" in said[0]
    with pytest.raises(UserError, match="512 positions"):
        check_positions(513, 512, are_learnt=True, report=said.append)
    check_ids([[], [1, 2]], 3)
    with pytest.raises(UserError, match="input 2"):
        check_ids([[1], [3]], 3)
