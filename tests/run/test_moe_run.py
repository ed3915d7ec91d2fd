"""Runs of models with experts: what they write is read by us and by plain PEFT as the model that was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from causal_types.small_models import small_network
from slow_cases import slow_but
from trietune.config import load_config
from trietune.config.settings import Settings
from trietune.errors import EXIT_USER_ERROR, UserError
from trietune.io.directory import read_directory
from trietune.model.adapter import adapter as adapter_module
from trietune.model.adapter.config import CONFIG_FILE
from trietune.model.adapter.export import export_adapter
from trietune.run.opened import evaluate, open_model, predict
from trietune.run.train import train
from trietune.tracking import events
from trietune.tracking.jsonl import FilesListener
from trietune.tracking.tracker import Tracker

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # PEFT looks for its own patterns among modules alone.
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),
]


class Heard:
    """What a run said."""

    name = "heard"

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.tracker = Tracker([self, FilesListener()])

    def handle(self, event: Any) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass

    @property
    def text(self) -> str:
        return "\n".join(e.text for e in self.events if isinstance(e, events.Message))


@pytest.fixture
def moe(tiny_model: Path, tmp_path: Path) -> Any:
    """A folder with a small random model of a type, under the tokenizer of the tiny Llama."""

    def make(model_type: str, **changes: Any) -> Path:
        folder = tmp_path / model_type
        shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
        small_network(model_type, vocab_size=400, **changes).save_pretrained(folder)
        return folder

    return make


def settings_of(overrides: dict[str, object], folder: Path, **more: object) -> Settings:
    return load_config(None, {**overrides, "model_name": str(folder), "max_steps": 3, **more})


def logits_of(network: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = network(torch.arange(3, 40)[None], use_cache=False).logits
    return logits


@pytest.mark.parametrize("model_type", slow_but(["mixtral", "qwen3_moe"], "mixtral"))
def test_a_run_with_experts_is_read_back_by_us_and_by_plain_peft(
    model_type: str, moe: Any, overrides: dict[str, object]
) -> None:
    folder = moe(model_type)
    run = train(settings_of(overrides, folder), tracker=Heard().tracker)
    assert run.adapter is not None
    document = json.loads((run.adapter / CONFIG_FILE).read_text())
    assert document["target_parameters"] == ["down_proj", "gate_up_proj"]
    again = evaluate(run.directory)
    assert again.metrics["eval/loss"] == pytest.approx(run.after["eval/loss"], rel=1e-5)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(run.adapter)).eval()
    ours = open_model(run.directory, [], Heard().tracker).model.network
    ours.set_attn_implementation("sdpa")  # type: ignore[operator]
    assert (logits_of(plain) - logits_of(ours)).abs().max() < 1e-4
    experts = [p for n, p in plain.named_parameters() if "experts" in n and "lora_B" in n]
    assert experts
    assert all(float(p.abs().max()) > 0 for p in experts)


def test_predict_export_merge_and_verify_of_a_run_with_experts(
    moe: Any, overrides: dict[str, object], tmp_path: Path
) -> None:
    folder = moe("olmoe")
    run = train(settings_of(overrides, folder), tracker=Heard().tracker)
    assert run.adapter is not None
    read_directory(run.adapter)
    opened = open_model(run.directory, [], Heard().tracker)
    [answer] = predict(opened, [{"sentence": "a good film"}])
    assert answer["label"] in ("positive", "negative")
    copied = export_adapter(run.directory, tmp_path / "copy").folder
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = logits_of(PeftModel.from_pretrained(base, str(copied)).eval())
    merged = export_adapter(run.directory, tmp_path / "merged", merge=True).folder
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    assert (logits_of(whole) - expected).abs().max() < 1e-4
    plain = export_adapter(run.directory, tmp_path / "plain", plain=True).folder
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    folded = logits_of(PeftModel.from_pretrained(base, str(plain)).eval())
    assert (folded - expected).abs().max() < 1e-4


@pytest.mark.slow
def test_a_resumed_run_with_experts_equals_one_that_never_stopped(moe: Any, overrides: dict[str, object]) -> None:
    folder = moe("mixtral")
    more: dict[str, object] = {"save_strategy": "step", "save_optim": True, "max_steps": 4}
    whole = train(settings_of(overrides, folder, **more, wandb_run_name="whole"), tracker=Heard().tracker)
    parts: dict[str, object] = {**more, "wandb_run_name": "parts"}
    train(settings_of(overrides, folder, **{**parts, "max_steps": 2}), tracker=Heard().tracker)
    resumed = settings_of(overrides, folder, **parts, resume_from_checkpoint=True)
    again = train(resumed, tracker=Heard().tracker, allowed_changes=frozenset({"max_steps"}))
    assert whole.adapter is not None
    assert again.adapter is not None
    name = adapter_module.WEIGHTS_FILE
    assert (whole.adapter / name).read_bytes() == (again.adapter / name).read_bytes()


def test_a_file_that_plain_peft_reads_as_another_model_ends_the_run_before_it_trains(
    moe: Any, overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapter_module.config_for_file
    dropped = []

    def without_parameters(*args: Any, **kwargs: Any) -> dict[str, Any]:
        document = made(*args, **kwargs)
        dropped.append(document.pop("target_parameters"))
        return document

    monkeypatch.setattr(adapter_module, "config_for_file", without_parameters)
    heard = Heard()
    with pytest.raises(UserError, match="plain PEFT would not read") as caught:
        train(settings_of(overrides, moe("mixtral"), save_strategy="step"), tracker=heard.tracker)
    assert dropped
    assert caught.value.exit_code == EXIT_USER_ERROR
    assert not [event for event in heard.events if isinstance(event, events.Saved | events.StepFinished)]
    directory = Path(str(overrides["project_dir"])) / "run"
    assert not (directory / "adapter").exists()
    assert not list(directory.glob("checkpoints/step-*"))


def test_a_scale_that_plain_peft_reads_differently_ends_the_run(
    tiny_model: Path, overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapter_module.config_for_file
    monkeypatch.setattr(
        adapter_module, "config_for_file", lambda *args, **kwargs: {**made(*args, **kwargs), "lora_alpha": 9}
    )
    with pytest.raises(UserError, match="its logits differ"):
        train(settings_of(overrides, tiny_model), tracker=Heard().tracker)


def test_the_plan_says_which_weights_carry_adapters_and_its_advice_works(
    moe: Any, overrides: dict[str, object]
) -> None:
    folder = moe("gpt_oss")
    heard = Heard()
    train(settings_of(overrides, folder, batching="padded"), tracker=heard.tracker)
    [started] = [event for event in heard.events if isinstance(event, events.RunStarted)]
    assert "% of the layers' weights" in dict(started.plan)["adapter"]
    assert "`lora_target_parameters: [gate_up_proj, down_proj]` adapts the experts" in heard.text
    more: dict[str, object] = {"lora_target_parameters": ["gate_up_proj", "down_proj"], "wandb_run_name": "experts"}
    heard = Heard()
    run = train(settings_of(overrides, folder, batching="padded", **more), tracker=heard.tracker)
    assert "not covered" not in heard.text
    assert evaluate(run.directory).metrics["eval/loss"] == pytest.approx(run.after["eval/loss"], rel=1e-5)


@pytest.mark.parametrize("key", ["lora_dropout", "use_dora"])
def test_what_experts_cannot_have_is_refused_with_advice_that_works(
    key: str, moe: Any, overrides: dict[str, object]
) -> None:
    folder = moe("mixtral")
    value = 0.1 if key == "lora_dropout" else True
    with pytest.raises(UserError, match=f"`{key}` is not possible on experts") as caught:
        train(settings_of(overrides, folder, **{key: value}), tracker=Heard().tracker)
    assert "lora_target_parameters=[]" in str(caught.value)
    settings = settings_of(overrides, folder, **{key: value}, lora_target_parameters=[], max_steps=1)
    assert train(settings, tracker=Heard().tracker).adapter is not None
