"""What a run keeps of each exact type is what was trained: evaluated, asked, resumed, and read by plain PEFT."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from causal_types.small_models import small_network
from causal_types.try_types import read_table
from tiny_model import write_tiny_model
from trietune import load_config, train
from trietune.model.base.folder import ModelFolder
from trietune.model.base.load import load_network
from trietune.run.opened import evaluate, open_model, predict
from trietune.tracking.tracker import Tracker

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

EXACT = [row["type"] for row in read_table() if row.get("trie", {}).get("status") == "exact"]
# Fused nodes with a window, experts in one parameter, whole rows; the other types take `make test-families`.
IN_SHORT = ("gemma2", "mixtral", "gpt2")


def model_folder(model_type: str, folder: Path) -> Path:
    """A small network of the type, with the tokenizer of the tiny Llama."""
    write_tiny_model(folder)
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    small_network(model_type).save_pretrained(folder)
    return folder


def data_file(path: Path) -> Path:
    draw = random.Random(4)
    stem = "".join(draw.choice("abcdefgh ") for _ in range(20))
    lines = [f'{{"prompt": "{stem[: 8 + n]}", "completion": "{"good" if n % 2 else "bad"}"}}' for n in range(12)]
    path.write_text("\n".join(lines))
    return path


def marks_of(model_type: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow, *([] if model_type in IN_SHORT else [pytest.mark.families])]


@pytest.mark.parametrize("model_type", [pytest.param(name, marks=marks_of(name)) for name in EXACT])
def test_an_adapter_is_what_was_trained(model_type: str, tmp_path: Path) -> None:
    base = model_folder(model_type, tmp_path / "model")
    file = data_file(tmp_path / "rows.jsonl")
    settings: dict[str, Any] = {
        "model_name": str(base), "train_file": str(file), "validation_file": str(file), "device": "cpu",
        "dtype": "float32", "batch_size": 4, "learning_rate": 1e-2, "max_steps": 4, "save_strategy": "step",
        "steps_freq": 2, "keep_last_n": 5, "use_wandb": False, "project_dir": str(tmp_path / "runs"), "seed": 3,
        "lora_r": 4, "max_length": 64, "num_epochs": 2, "save_optim": True,
    }  # fmt: skip
    whole = train(load_config(None, {**settings, "wandb_run_name": "whole"}))
    train(load_config(None, {**settings, "wandb_run_name": "parts", "max_steps": 2}))
    parts = train(
        load_config(None, {**settings, "wandb_run_name": "parts", "resume_from_checkpoint": True}),
        allowed_changes=frozenset({"max_steps"}),
    )
    weights = [(run.directory / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, parts)]
    assert weights[0] == weights[1], "a resumed run ends with the same adapter"
    assert evaluate(whole.directory).metrics["eval/loss"] == pytest.approx(whole.after["eval/loss"], rel=1e-4)
    opened = open_model(whole.directory, {}, Tracker())
    assert predict(opened, ["abc"], max_new_tokens=3)
    network = load_network(ModelFolder(base, "x", "folder"), dtype=torch.float32, device=torch.device("cpu"))
    plain = PeftModel.from_pretrained(network, str(whole.directory / "adapter")).eval()
    tokens = torch.arange(5, 17)[None]
    with torch.no_grad():
        theirs = plain(input_ids=tokens, use_cache=False).logits
        opened.model.network.set_attn_implementation(opened.model.library_attention)
        ours: Any = opened.model.network(input_ids=tokens, use_cache=False).logits
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
