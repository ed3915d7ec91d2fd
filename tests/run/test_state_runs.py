"""Whole runs of models whose layers carry a state: as trees, as packed and as padded batches, and what they leave."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from states.state_families import build, in_double
from trietune.config import load_config
from trietune.config.settings import Settings
from trietune.model.adapter import adapter as adapter_module
from trietune.run.opened import evaluate, open_model, predict
from trietune.run.train import train
from trietune.tracking import events
from trietune.tracking.jsonl import FilesListener
from trietune.tracking.tracker import Tracker

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
# Adapters after three steps in fp32. AdamW's first steps divide by small moments, so rounding of 1e-7 in a gradient is
# more in a weight: of nine families, fp32 rows by transformers alone end up to 6.6e-4 (qwen3_5_text) from fp64 rows.
# In fp64 tries, padded rows and single rows agree to 2e-13.
SAME_ADAPTER = 1e-3
SAME_ADAPTER_IN_FP64 = 1e-9


class Heard:
    """What a run said."""

    name = "heard"

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.tracker = Tracker([self, FilesListener()])

    def handle(self, event: Any) -> None:
        if isinstance(event, events.Message):
            self.texts.append(event.text)

    def close(self) -> None:
        pass


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Any:
    """A small random model of a family, under the tokenizer of the tiny Llama."""

    def make(family: str) -> Path:
        path = tmp_path / family
        shutil.copytree(tiny_model, path, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
        # Weights as large as those of the parity tests saturate a loss on three steps.
        network = build(family, vocab_size=400)
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(0.5)
        network.save_pretrained(path)
        return path

    return make


def settings_of(overrides: dict[str, object], folder: Path, **more: object) -> Settings:
    return load_config(None, {**overrides, "model_name": str(folder), "max_steps": 3, **more})


def weights_of(run: Any) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run.adapter / adapter_module.WEIGHTS_FILE)


def logits_of(network: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = network(torch.arange(3, 40)[None], use_cache=False).logits
    return logits


def check_run(family: str, folder: Any, overrides: dict[str, object], **more: object) -> None:
    path, heard = folder(family), Heard()
    run = train(settings_of(overrides, path, wandb_run_name="trie", **more), tracker=heard.tracker)
    assert any("values and gradients of plain rows" in text for text in heard.texts)
    padded = train(
        settings_of(overrides, path, wandb_run_name="padded", batching="padded", **more), tracker=Heard().tracker
    )
    ours, theirs = weights_of(run), weights_of(padded)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert (ours[name] - weight).norm() <= SAME_ADAPTER * (1e-3 + weight.norm()), name
    again = evaluate(run.directory, tracker=Heard().tracker)
    assert again.metrics["eval/loss"] == pytest.approx(run.after["eval/loss"], rel=1e-5)
    opened = open_model(run.directory, [], Heard().tracker)
    [answer] = predict(opened, [{"sentence": "a good film"}])
    assert answer["label"] in ("positive", "negative")
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(run.adapter)).eval()
    ours_opened = opened.model.network
    ours_opened.set_attn_implementation("eager")  # type: ignore[operator]
    assert (logits_of(plain) - logits_of(ours_opened)).abs().max() < 1e-4


def test_a_run_trains_as_padded_rows_do_and_is_evaluated_asked_and_read_by_plain_peft(
    folder: Any, overrides: dict[str, object]
) -> None:
    check_run("lfm2", folder, overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    ["lfm2_moe", "qwen3_5_text", "qwen3_next", "olmo_hybrid", "granitemoehybrid", "bamba", "falcon_h1", "jamba"],
)
def test_every_familys_runs_do(family: str, folder: Any, overrides: dict[str, object]) -> None:
    more = {"lora_target_modules": ["q_proj", "in_proj", "gate_proj"]} if family == "falcon_h1" else {}
    check_run(family, folder, overrides, gradient_checkpointing=True, **more)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1"])
def test_what_adapters_differ_by_after_adamw_is_rounding(
    family: str, folder: Any, overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two that are furthest apart in fp32 (1.2e-4, 2.8e-4), in fp64 throughout."""
    path = folder(family)
    more = {"lora_target_modules": ["q_proj", "in_proj", "gate_proj"]} if family == "falcon_h1" else {}
    monkeypatch.setattr("trietune.run.opening.choose_dtype", lambda *args, **how: torch.float64)
    with in_double():
        ours, theirs = (
            weights_of(
                train(
                    settings_of(overrides, path, wandb_run_name=batching, batching=batching, **more),
                    tracker=Heard().tracker,
                )
            )
            for batching in ("trie", "padded")
        )
    assert all(weight.dtype == torch.float64 for weight in theirs.values())
    for name, weight in theirs.items():
        assert (ours[name] - weight).norm() <= SAME_ADAPTER_IN_FP64 * (1e-3 + weight.norm()), name


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_never_stopped(folder: Any, overrides: dict[str, object]) -> None:
    path = folder("qwen3_5_text")
    more: dict[str, object] = {"save_strategy": "step", "save_optim": True, "max_steps": 4}
    whole = train(settings_of(overrides, path, **more, wandb_run_name="whole"), tracker=Heard().tracker)
    parts: dict[str, object] = {**more, "wandb_run_name": "parts"}
    train(settings_of(overrides, path, **{**parts, "max_steps": 2}), tracker=Heard().tracker)
    resumed = settings_of(overrides, path, **parts, resume_from_checkpoint=True)
    again = train(resumed, tracker=Heard().tracker, allowed_changes=frozenset({"max_steps"}))
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(again)[name], weight)
