"""Whole runs on the card: the same numbers as on the CPU, fp16, 4 bits, memory that runs out, and checkpoints moved.

These ask for the card itself; their twins on the CPU are in `tests/run/test_cuda_stand_in.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from run.conftest import overrides, reviews, tiny_model  # noqa: F401  # fixtures
from run.test_cuda_stand_in import wide  # noqa: F401  # a fixture
from run.test_run import Recorder, adapter_of, run
from trietune.tracking.events import Message, RunStarted, StepFinished

# PEFT 0.21 asks transformers 5.23 by a name that the latter has renamed.
pytestmark = [
    pytest.mark.card,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

# Of the loss, over steps of AdamW, by the base's number format.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}


def plan_of(recorder: Recorder) -> dict[str, str]:
    return dict(recorder.of(RunStarted)[0].plan)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_losses_are_those_of_the_cpu(wide: dict[str, object], dtype: str) -> None:  # noqa: F811
    expected = run({**wide, "device": "cpu", "wandb_run_name": "cpu"})[1].losses
    recorder = run({**wide, "device": "cuda", "dtype": dtype})[1]
    assert recorder.losses == pytest.approx(expected, rel=TOLERANCES[dtype])
    assert "NVIDIA" in plan_of(recorder)["device"]


@pytest.mark.parametrize("attention", ["varlen", "flex", "mask", "rows"])
def test_every_way_to_attend_passes_the_self_check(wide: dict[str, object], attention: str) -> None:  # noqa: F811
    recorder = run({**wide, "device": "cuda", "dtype": "bfloat16", "attention": attention})[1]
    assert f"attention: {attention}" in plan_of(recorder)["batching"]


def test_compilations_end_with_the_warm_up(wide: dict[str, object]) -> None:  # noqa: F811
    recorder = run({**wide, "device": "cuda", "attention": "flex", "max_steps": 12, "self_check": False})[1]
    counts = [event.metrics["num_compilations"] for event in recorder.of(StepFinished)]
    assert counts[-1] == counts[3], f"compiled at each of {counts}"


def test_fp16_trains_with_a_scaled_loss(wide: dict[str, object]) -> None:  # noqa: F811
    finished, recorder = run({**wide, "device": "cuda", "dtype": "float16", "max_steps": 6, "save_optim": True})
    assert "with a scaled loss" in plan_of(recorder)["device"]
    newest = sorted((finished.directory / "checkpoints").glob("step-*"))[-1]
    assert json.loads((newest / "trainer_state.json").read_text())["loss_scale"]["scale"] >= 1


def test_memory_that_runs_out_is_written_down_and_survived(
    wide: dict[str, object],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A card of which all but a little is taken away once the model is loaded."""
    from trietune.model.causal_lm import TrieModel

    original = TrieModel.label_losses

    def greedy(self: Any, micro_batch: Any, *others: Any) -> Any:
        if self.network.training and micro_batch.num_positions > 60:
            torch.empty(2**50, device="cuda")
        return original(self, micro_batch, *others)

    monkeypatch.setattr(TrieModel, "label_losses", greedy)
    finished, recorder = run({**wide, "device": "cuda", "batch_size": 16})
    assert finished.step == 3
    assert (finished.directory / "memory_snapshot.pickle").stat().st_size > 1000
    assert any(event.text.startswith("memory ran out") for event in recorder.of(Message))


def test_a_checkpoint_moves_to_the_cpu_and_back(wide: dict[str, object]) -> None:  # noqa: F811
    settings = {**wide, "save_optim": True, "max_steps": 4, "dtype": "float32"}
    expected = adapter_of(run({**settings, "device": "cpu", "wandb_run_name": "cpu"})[0])
    allowed = frozenset({"max_steps", "device"})
    run({**settings, "device": "cuda", "max_steps": 1})
    run({**settings, "device": "cpu", "max_steps": 3, "resume_from_checkpoint": True}, allowed_changes=allowed)
    finished, _ = run({**settings, "device": "cuda", "resume_from_checkpoint": True}, allowed_changes=allowed)
    found = adapter_of(finished)
    difference = max(float((found[n] - t).norm() / t.norm()) for n, t in expected.items())
    assert difference < 1e-3


def test_a_base_in_4_bits_trains(wide: dict[str, object], tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("bitsandbytes")
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(str(wide["model_name"]))
    config = LlamaConfig.from_pretrained(
        folder, hidden_size=128, intermediate_size=256, num_attention_heads=4, head_dim=32
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _, recorder = run({**wide, "device": "cuda", "dtype": "bfloat16", "load_in_4bit": True, "max_steps": 6})
    assert "base in 4 bits, computing in bfloat16" in plan_of(recorder)["device"]
    assert recorder.losses[-1] < recorder.losses[0]
