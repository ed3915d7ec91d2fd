"""Training, `evaluate` and `predict` compute nothing that was not proven, and say what runs in another way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trietune import UserError, load_config, train
from trietune.model.attention import layout as trie_layout
from trietune.run.opened import evaluate, open_model, predict
from trietune.tracking.tracker import Tracker


def sees_its_future(trie: Any, window: int | None = None) -> np.ndarray:
    return np.ones((trie.num_nodes, trie.num_nodes), bool)


def test_evaluate_and_predict_are_proven_too(overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(load_config(None, {**overrides, "max_steps": 1})).directory
    masked = {"attention": "mask"}
    right = evaluate(run, overrides=masked).metrics["eval/loss"]
    monkeypatch.setattr(trie_layout, "visibility", sees_its_future)
    said: list[str] = []

    class Keeps(Tracker):
        def emit(self, event: Any) -> None:
            said.append(getattr(event, "text", ""))

    hub = Keeps()
    assert evaluate(run, overrides=masked, tracker=hub).metrics["eval/loss"] == pytest.approx(right, rel=1e-5)
    assert predict(open_model(run, masked, hub), ["a fine film"])
    assert sum("tries run on whole rows" in text and "layer 0" in text for text in said) == 2, said
    unproven = {**masked, "self_check": False}
    assert evaluate(run, overrides=unproven).metrics["eval/loss"] != pytest.approx(right, abs=1e-4)
    assert predict(open_model(run, unproven, Tracker()), ["a fine film"])


@pytest.fixture
def with_sinks(tiny_model: Path, tmp_path: Path) -> Path:
    """A tiny gpt-oss with the tokenizer of the tiny Llama."""
    import torch
    from transformers import AutoTokenizer, GptOssConfig, GptOssForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(tmp_path / "sinks")
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=8,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0, rope_parameters={"rope_theta": 1e4},
        max_position_embeddings=512,
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(tmp_path / "sinks")
    return tmp_path / "sinks"


def test_layers_with_sinks_train_and_answer_through_transformers(overrides: dict[str, Any], with_sinks: Path) -> None:
    changed = {
        **overrides, "model_name": str(with_sinks), "max_steps": 2, "lora_target_modules": ["q_proj", "v_proj"],
        "max_grad_norm": 1.0, "learning_rate": 1e-3,
    }  # fmt: skip
    trie = train(load_config(None, {**changed, "wandb_run_name": "trie"}))
    padded = train(load_config(None, {**changed, "wandb_run_name": "padded", "batching": "padded"}))
    said = [
        str(event.get("text"))
        for event in map(json.loads, (trie.directory / "metrics.jsonl").read_text().splitlines())
        if "text" in event
    ]
    assert any("layers 0, 1 attend through transformers under a mask" in text for text in said), said
    assert trie.after["eval/loss"] == pytest.approx(padded.after["eval/loss"], rel=1e-4)
    assert predict(open_model(trie.directory, {}, Tracker()), ["a fine film"])
    with pytest.raises(UserError, match="passes `s_aux` to its attention"):
        train(load_config(None, {**changed, "wandb_run_name": "unproven", "self_check": False}))
