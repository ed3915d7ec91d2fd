"""`base_dropout`: the base model's own dropout is off while a run trains unless it is asked for; the plan says so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from causal_types.small_models import small_network
from trietune.config import load_config
from trietune.errors import UserError
from trietune.run.train import train
from trietune.tracking import events
from trietune.tracking.tracker import Tracker

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


class Heard:
    name = "heard"

    def __init__(self) -> None:
        self.events: list[Any] = []

    def handle(self, event: Any) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass

    @property
    def losses(self) -> list[float]:
        return [e.metrics["train/loss"] for e in self.events if isinstance(e, events.StepFinished)]

    @property
    def plan(self) -> dict[str, str]:
        [started] = [e for e in self.events if isinstance(e, events.RunStarted)]
        return dict(started.plan)


@pytest.fixture
def gpt2(tiny_model: Path, tmp_path: Path) -> Any:
    def make(**changes: Any) -> str:
        folder = tmp_path / "gpt2"
        shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
        small_network("gpt2", vocab_size=400, **changes).save_pretrained(folder)
        return str(folder)

    return make


def run(overrides: dict[str, object], **more: object) -> Heard:
    heard = Heard()
    train(load_config(None, {**overrides, "max_steps": 2, **more}), tracker=Tracker([heard]))
    return heard


def test_dropout_of_the_base_is_off_and_said(gpt2: Any, overrides: dict[str, object]) -> None:
    folder = gpt2()
    trie = run(overrides, model_name=folder)
    assert "is off" in trie.plan["dropout"]
    assert "resid_pdrop 0.1" in trie.plan["dropout"]
    padded = run(overrides, model_name=folder, batching="padded")
    assert trie.losses == pytest.approx(padded.losses, rel=1e-4)


def test_dropout_of_the_base_stays_on_where_it_is_asked_for(gpt2: Any, overrides: dict[str, object]) -> None:
    folder = gpt2(attn_pdrop=0.0, resid_pdrop=0.5)
    without = run(overrides, model_name=folder)
    kept = run(overrides, model_name=folder, base_dropout=True)
    assert "stays on" in kept.plan["dropout"]
    assert "drawn once per node" in kept.plan["dropout"]
    assert abs(kept.losses[0] - without.losses[0]) > 1e-3
    again = run(overrides, model_name=folder, base_dropout=True)
    assert again.losses == kept.losses
    assert run(overrides, model_name=folder, base_dropout=True, seed=5).losses[0] != kept.losses[0]


def test_dropout_on_attention_weights_is_refused_on_a_trie_with_advice_that_works(
    gpt2: Any, overrides: dict[str, object]
) -> None:
    folder = gpt2()
    with pytest.raises(UserError, match=r"dropout on attention weights \(`attn_pdrop: 0.1`\)") as caught:
        run(overrides, model_name=folder, base_dropout=True)
    assert "base_dropout=False" in str(caught.value)
    assert "stays on" in run(overrides, model_name=folder, base_dropout=True, batching="padded").plan["dropout"]


def test_a_base_without_dropout_says_so_where_it_is_asked_for(overrides: dict[str, object]) -> None:
    assert "has none of its own" in run(overrides, base_dropout=True).plan["dropout"]
    assert "dropout" not in run(overrides, wandb_run_name="other").plan
