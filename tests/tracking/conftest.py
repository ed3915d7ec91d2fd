"""One small run, as the events that it emits; every listener is tested on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trietune.tracking.events import (
    Evaluated,
    Event,
    ExamplesShown,
    Histograms,
    MarkedExample,
    Message,
    PhaseProgress,
    Prediction,
    PredictionsShown,
    Removed,
    RunFinished,
    RunStarted,
    Saved,
    StepFinished,
)

HOSTILE = "not as bad as the posters say </script><script>alert(1)</script> & \u2028 \x1b[31mred"


def run_events(
    directory: Path, *, num_steps: int = 12, first_step: int = 0, learning_rate: float = 2e-4
) -> Iterator[Event]:
    """A run that logs every second step, evaluates and saves every sixth, and gets better."""
    yield PhaseProgress("tokenizing", 0, 800, "examples")
    yield PhaseProgress("tokenizing", 800, 800, "examples")
    yield Message("reviews.tsv: 800 read, 792 kept, 5 duplicates, 3 longer than 64 tokens (reviews.tsv:17, :40, :311)")
    yield Message("`use_tt: True`, and no Tenstorrent device is here: on the CPU", level="warning")
    yield RunStarted(
        name=directory.name,
        directory=directory,
        num_steps=num_steps,
        first_step=first_step,
        config={
            "model_name": "SmolLM2-135M-Instruct",
            "dataset_id": "sst2",
            "learning_rate": learning_rate,
            "lora_target_modules": "all-linear",
            "wandb_tags": ["a", "b"],
            "max_steps": None,
        },
        environment={"trietune": "0.1.0", "python": "3.11.7", "device": "cpu"},
        plan=[("model", "SmolLM2-135M-Instruct in bfloat16 on cpu"), ("adapter", "LoRA, rank 8"), ("steps", "12")],
    )
    yield ExamplesShown(
        [
            MarkedExample(
                "reviews.tsv:2", [("<s>", False), ("Review: fine\nOutput:", False), (" good", True), ("</s>", True)]
            )
        ]
    )
    yield PhaseProgress("evaluating", 100, 200, "examples")
    yield evaluation(0, "before", 2.1034, 0.505, 200)
    for step in range(first_step + 1, num_steps + 1):
        metrics = {
            "train/loss": 2.0 / step,
            "learning_rate": learning_rate,
            "grad_norm": 1.5,
            "examples_per_second": 30.25,
            "tokens_per_second": 642.0,
            "sharing_factor": 1.31,
            "memory_bytes": 1.31e9,
        }
        yield StepFinished(step, step / 6, metrics, [f"reviews.tsv:{step}", f"reviews.tsv:{step + 50}"], step % 2 == 0)
        if step % 6 == 0:
            yield evaluation(step, "during", 2.0 / step, 0.7 + step / 100, 100)
            yield Saved(
                "checkpoint", step, directory / "checkpoints" / f"step-{step:08}", {"eval/loss": 2.0 / step}, 0.2
            )
    yield Removed(6, directory / "checkpoints" / "step-00000006")
    yield evaluation(num_steps, "after", 0.3911, 0.875, 200)
    yield PredictionsShown(
        num_steps,
        "after",
        [
            Prediction("dev.tsv:2", "Review: warm and funny\nOutput:", "positive", "positive", True),
            Prediction("dev.tsv:3", f"Review: {HOSTILE}\nOutput:", "positive", "negative", False),
        ],
    )
    yield Saved("adapter", num_steps, directory / "adapter", {}, 0.1)
    yield RunFinished("finished", num_steps, 93.4, {"eval/accuracy": 0.875}, [f"trietune predict {directory}"])


def evaluation(step: int, when: str, loss: float, accuracy: float, num_examples: int) -> Evaluated:
    """An evaluation with an interval of five percent to both sides."""
    return Evaluated(
        step=step,
        epoch=step / 6,
        metrics={"eval/loss": loss, "eval/accuracy": accuracy},
        num_examples=num_examples,
        when=when,  # type: ignore[arg-type]
        intervals={"eval/accuracy": (accuracy - 0.05, accuracy + 0.05)},
    )


@pytest.fixture
def events() -> Callable[..., Iterator[Event]]:
    return run_events


@pytest.fixture
def histograms() -> Histograms:
    import numpy as np

    arrays = {
        "parameters/lora_A": np.linspace(-1, 1, 500, dtype=np.float32),
        "gradients/lora_A": np.array([1.0, np.nan, 3.0], dtype=np.float32),
    }
    return Histograms(4, arrays)
