"""Whole runs of a tiny model: what is written, that it repeats, stops, goes on, and that keys have their effect."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from slow_cases import slow_but
from trietune import UserError, load_config, train
from trietune.run.result import Run
from trietune.tracking.events import (
    Evaluated,
    Event,
    ExamplesShown,
    Histograms,
    Message,
    PredictionsShown,
    RunFinished,
    StepFinished,
)
from trietune.tracking.jsonl import FilesListener
from trietune.tracking.tracker import Tracker


class Recorder:
    """Keeps every event, and calls `react` on each."""

    name = "recorder"

    def __init__(self, react: Callable[[Event], None] = lambda event: None) -> None:
        self.events: list[Event] = []
        self.react = react

    def handle(self, event: Event) -> None:
        self.events.append(event)
        self.react(event)

    def close(self) -> None:
        pass

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def losses(self) -> list[float]:
        return [event.metrics["train/loss"] for event in self.of(StepFinished)]


def run(settings: dict[str, object], recorder: Recorder | None = None, **arguments: Any) -> tuple[Run, Recorder]:
    recorder = recorder or Recorder()
    tracker = Tracker([recorder])
    tracker.add(FilesListener())
    return train(load_config(None, settings), tracker=tracker, **arguments), recorder


def adapter_of(run: Run) -> dict[str, torch.Tensor]:
    assert run.adapter is not None
    return load_file(run.adapter / "adapter_model.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_a_run_leaves_what_the_design_promises(overrides: dict[str, object]) -> None:
    finished, recorder = run(overrides)
    folder = finished.directory
    assert finished.exit_code == 0
    assert finished.step == 6
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "batches.jsonl", "adapter/manifest.json",
                 "adapter/prompt_format.json", "adapter/README.md", "adapter/adapter_config.json"):  # fmt: skip
        assert (folder / name).is_file(), name
    lines = [json.loads(line) for line in (folder / "batches.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(len(line["ids"]) == 8 for line in lines)
    assert recorder.losses[-1] < recorder.losses[0]
    assert {event.when for event in recorder.of(Evaluated)} == {"before", "during", "after"}
    assert finished.after["eval/loss"] < finished.before["eval/loss"]


def test_two_runs_give_the_same_bytes(overrides: dict[str, object]) -> None:
    first, _ = run({**overrides, "deterministic": True, "lora_dropout": 0.1})
    second, _ = run({**overrides, "deterministic": True, "lora_dropout": 0.1})
    torch.use_deterministic_algorithms(False)
    assert second.directory.name == "run-2"
    one, two = (r.directory / "adapter" / "adapter_model.safetensors" for r in (first, second))
    assert one.read_bytes() == two.read_bytes()


def test_trie_packed_and_padded_train_the_same_adapter(overrides: dict[str, object]) -> None:
    adapters = {b: adapter_of(run({**overrides, "batching": b})[0]) for b in ("trie", "packed", "padded")}
    # AdamW divides by the gradient's own size, which makes rounding errors of tiny gradients visible in the weights.
    assert largest_difference(adapters["trie"], adapters["padded"]) < 2e-3
    assert largest_difference(adapters["trie"], adapters["packed"]) < 2e-3


def test_micro_batches_and_accumulation_change_nothing(overrides: dict[str, object]) -> None:
    whole, one = run({**overrides, "batch_size": 16, "max_steps": 3})
    cut, two = run({**overrides, "batch_size": 16, "max_steps": 3, "max_tokens_per_micro_batch": 128})
    accumulated, three = run({**overrides, "batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 3})
    assert any(event.metrics["num_micro_batches"] > 1 for event in two.of(StepFinished))
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-4)
    np.testing.assert_allclose(three.losses, one.losses, rtol=1e-4)
    assert largest_difference(adapter_of(whole), adapter_of(cut)) < 2e-3
    assert largest_difference(adapter_of(whole), adapter_of(accumulated)) < 2e-3


def test_a_resumed_run_equals_one_that_never_stopped(overrides: dict[str, object]) -> None:
    settings = {
        **overrides, "save_optim": True, "save_strategy": "step", "steps_freq": 2, "lora_dropout": 0.1,
        "lr_scheduler_type": "linear", "warmup_steps": 2, "num_epochs": 2, "max_steps": 12, "keep_last_n": 10,
    }  # fmt: skip
    unbroken, _ = run({**settings, "wandb_run_name": "unbroken"})

    def interrupt(event: Event) -> None:
        if isinstance(event, StepFinished) and event.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped, _ = run({**settings, "wandb_run_name": "broken"}, Recorder(interrupt))
    assert (stopped.status, stopped.step, stopped.exit_code) == ("stopped", 5, 143)
    assert stopped.adapter is None
    assert not (stopped.directory / "adapter").exists()
    resumed, recorder = run({**settings, "wandb_run_name": "broken", "resume_from_checkpoint": True})
    assert resumed.step == 12
    assert recorder.of(StepFinished)[0].step == 6
    one, two = (r.directory / "adapter" / "adapter_model.safetensors" for r in (unbroken, resumed))
    assert one.read_bytes() == two.read_bytes()
    again, recorder = run({**settings, "wandb_run_name": "broken", "resume_from_checkpoint": True})
    assert again.status == "finished"
    assert not recorder.of(StepFinished)
    assert any("has already finished" in said.text for said in recorder.of(Message))


def with_free_memory(monkeypatch: pytest.MonkeyPatch, *, packs: bool, max_positions: int) -> None:
    monkeypatch.setattr("trietune.model.assemble.PACKED_SHARE", 0.3 if packs else 0.0)
    monkeypatch.setattr("trietune.run.planning.micro_batch_bound", lambda free, each: max_positions)


def test_a_resume_cuts_and_packs_as_before_whatever_memory_is_free(
    overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        **overrides, "save_optim": True, "max_steps": 6, "batch_size": 16, "max_tokens_per_micro_batch": "auto",
    }  # fmt: skip
    stop_at_3 = lambda event: (  # noqa: E731
        os.kill(os.getpid(), signal.SIGTERM) if isinstance(event, StepFinished) and event.step == 3 else None
    )
    with_free_memory(monkeypatch, packs=True, max_positions=100_000)
    plenty, _ = run({**settings, "wandb_run_name": "plenty"})
    run({**settings, "wandb_run_name": "then-little"}, Recorder(stop_at_3))
    with_free_memory(monkeypatch, packs=False, max_positions=128)
    little, cut = run({**settings, "wandb_run_name": "little"})
    assert max(event.metrics["num_micro_batches"] for event in cut.of(StepFinished)) > 1
    assert any((adapter_of(plenty)[name] != tensor).any() for name, tensor in adapter_of(little).items())
    _, warned = run({**settings, "wandb_run_name": "then-little", "resume_from_checkpoint": True})
    said = [event.text for event in warned.of(Message)]
    assert any("micro-batches of at most 128 tokens instead of 100,000" in text for text in said)
    assert any("fewer weights are packed" in text for text in said)
    run({**settings, "wandb_run_name": "then-plenty"}, Recorder(stop_at_3))
    with_free_memory(monkeypatch, packs=True, max_positions=100_000)
    resumed, recorder = run({**settings, "wandb_run_name": "then-plenty", "resume_from_checkpoint": True})
    assert not any("less memory is free" in event.text for event in recorder.of(Message))
    one, two = (r.directory / "adapter" / "adapter_model.safetensors" for r in (little, resumed))
    assert one.read_bytes() == two.read_bytes()


def test_a_signal_in_evaluation_saves_what_was_learnt(overrides: dict[str, object]) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, StepFinished) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    stopped, _ = run({**overrides, "val_steps_freq": 2}, Recorder(interrupt))
    assert (stopped.status, stopped.exit_code) == ("stopped", 130)
    assert (stopped.directory / "checkpoints" / "step-00000002" / "manifest.json").is_file()


def test_max_time_stops_and_saves(overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [0.0]
    monkeypatch.setattr("trietune.run.stopping.time.monotonic", lambda now=time.monotonic: now() + passed[0])

    def pass_an_hour(event: Event) -> None:
        if isinstance(event, StepFinished) and event.step == 2:
            passed[0] = 3600.0

    stopped, _ = run({**overrides, "max_time": 3600}, Recorder(pass_an_hour))
    assert stopped.step == 2
    assert stopped.status == "stopped"
    assert stopped.exit_code == 0
    assert list((stopped.directory / "checkpoints").glob("step-*"))


def test_a_gradient_that_is_not_finite_stops_with_ids(
    overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trietune.training import loop

    clip = loop._clip

    def plant(parameters: Any, max_grad_norm: float | None) -> float:
        plant.calls += 1  # type: ignore[attr-defined]
        if plant.calls == 3:  # type: ignore[attr-defined]
            parameters[0].grad.fill_(float("inf"))
        return clip(parameters, max_grad_norm)

    plant.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(loop, "_clip", plant)
    recorder = Recorder()
    with pytest.raises(UserError) as caught:
        run({**overrides, "save_strategy": "step"}, recorder)
    assert caught.value.exit_code == 5
    for part in ("gradient of step 3", "train.tsv:", "learning_rate"):
        assert part in str(caught.value)
    [finished] = recorder.of(RunFinished)
    assert finished.status == "failed"
    folder = Path(str(overrides["project_dir"])) / "run"
    assert not (folder / "adapter").exists()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_a_run_works_outside_the_main_thread(overrides: dict[str, object]) -> None:
    found: list[Run] = []
    thread = threading.Thread(target=lambda: found.append(run({**overrides, "max_steps": 1})[0]))
    thread.start()
    thread.join()
    assert found[0].step == 1


def test_questions_are_answered_and_measured(overrides: dict[str, object], questions: Path) -> None:
    settings = {
        **overrides, "dataset_id": "squad_v2", "train_file": str(questions / "train.json"),
        "validation_file": str(questions / "dev.json"), "max_length": 256,
    }  # fmt: skip
    finished, recorder = run({**settings, "print_examples": True, "max_steps": 40, "num_epochs": 20})
    # What is shown as right is what the metric counts as right, `unanswerable` included.
    shown = recorder.of(PredictionsShown)[-1].predictions
    assert len(shown) == 9
    share = sum(bool(prediction.is_right) for prediction in shown) / 9
    assert share == pytest.approx(finished.after["eval/exact_match"])
    assert {"eval/exact_match", "eval/f1", "eval/no_answer_exact_match"} <= set(finished.after)
    # Three questions share each paragraph, and `auto` lets them meet.
    assert recorder.of(StepFinished)[0].metrics["sharing_factor"] > 1.8


EFFECTS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "learning_rate": ({}, {"learning_rate": 1e-3}),
    "batch_size": ({}, {"batch_size": 4}),
    "num_epochs": ({"max_steps": None, "batch_size": 30}, {"max_steps": None, "batch_size": 30, "num_epochs": 2}),
    "optim": ({}, {"optim": "sgd"}),
    "seed": ({}, {"seed": 24}),
    "lora_r": ({}, {"lora_r": 2}),
    "lora_alpha": ({}, {"lora_alpha": 64}),
    "lora_target_modules": ({}, {"lora_target_modules": ["q_proj"]}),
    "lora_dropout": ({}, {"lora_dropout": 0.3}),
    "use_rslora": ({}, {"use_rslora": True}),
    "use_dora": ({}, {"use_dora": True}),
    "lora_bias": ({}, {"lora_bias": "lora_only"}),
    "modules_to_save": ({}, {"modules_to_save": ["lm_head"]}),
    "weight_decay": ({}, {"weight_decay": 0.5}),
    "max_grad_norm": ({}, {"max_grad_norm": 0.01}),
    "lr_scheduler_type": ({}, {"lr_scheduler_type": "cosine"}),
    "warmup_steps": ({}, {"warmup_steps": 2}),
    "warmup_ratio": ({}, {"warmup_ratio": 0.5}),
    "dtype": ({}, {"dtype": "bfloat16"}),
    "max_length": ({}, {"max_length": 18}),
    "max_train_examples": ({}, {"max_train_examples": 30}),
    "overlong": ({"max_length": 18}, {"max_length": 18, "overlong": "truncate_prompt"}),
    "prompt_template": (
        {}, {"prompt_template": "{sentence}?", "completion_template": " {label}"},
    ),
    "add_bos": ({}, {"add_bos": True}),
    "group_by_prefix": ({"group_by_prefix": False}, {"group_by_prefix": True}),
}  # fmt: skip


@pytest.mark.parametrize("key", slow_but(EFFECTS, "learning_rate", "optim", "lora_dropout", "overlong", "add_bos"))
def test_key_changes_what_is_learnt(key: str, overrides: dict[str, object]) -> None:
    one, two = EFFECTS[key]
    base = {**overrides, "max_steps": 3, "eval_max_examples": 4}
    first, second = adapter_of(run({**base, **one})[0]), adapter_of(run({**base, **two})[0])
    same = first.keys() == second.keys() and all(
        first[name].shape == second[name].shape and torch.equal(first[name], second[name]) for name in first
    )
    assert not same, f"`{key}` made no difference"


@pytest.mark.parametrize("attention", ["rows", "mask"])
@pytest.mark.parametrize("checkpointing", slow_but([False, True], True))
def test_attention_and_checkpointing_change_no_number(
    attention: str, checkpointing: bool, overrides: dict[str, object]
) -> None:
    plain = run({**overrides, "max_steps": 3})[1].losses
    other = run({**overrides, "max_steps": 3, "attention": attention, "gradient_checkpointing": checkpointing})[1]
    np.testing.assert_allclose(other.losses, plain, rtol=1e-4)


def test_fused_layers_change_speed_alone(overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    from trietune.model.fast import norms_and_mlps as fused

    calls = []
    backward = fused.GatedMlp.backward
    monkeypatch.setattr(fused.GatedMlp, "backward", staticmethod(lambda *a: (calls.append(1), backward(*a))[1]))
    losses = run({**overrides, "max_steps": 3})[1].losses
    assert calls
    calls.clear()
    plain = run({**overrides, "max_steps": 3, "fused_layers": False})[1].losses
    assert not calls
    np.testing.assert_allclose(losses, plain, rtol=1e-4)


@pytest.mark.parametrize("pack_weights", [True, False])
def test_pack_weights_changes_speed_alone(
    pack_weights: bool, overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trietune.model.fast import frozen_weight

    products = []
    product = frozen_weight._product
    monkeypatch.setattr(frozen_weight, "_product", lambda *a: (products.append(1), product(*a))[1])
    losses = run({**overrides, "max_steps": 3, "pack_weights": pack_weights})[1].losses
    assert bool(products) == pack_weights
    plain = run({**overrides, "max_steps": 3, "fused_layers": False})[1].losses
    np.testing.assert_allclose(losses, plain, rtol=1e-4)


def test_gradient_checkpointing_recomputes(overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    from trietune.model.attention import rows as row_attention

    calls = []
    forward = row_attention.RowAttention.forward
    monkeypatch.setattr(
        row_attention.RowAttention, "forward", staticmethod(lambda *a: (calls.append(1), forward(*a))[1])
    )
    counts = []
    for checkpointing in (False, True):
        calls.clear()
        run({**overrides, "max_steps": 1, "self_check": False, "gradient_checkpointing": checkpointing})
        counts.append(len(calls))
    assert counts[1] == counts[0] + 2  # once more for each of the two layers


def test_self_check_catches_a_wrong_mask(overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    from trietune.model.attention import layout as trie_layout

    def sees_its_future(trie: Any, window: int | None = None) -> np.ndarray:
        return np.ones((trie.num_nodes, trie.num_nodes), bool)

    monkeypatch.setattr(trie_layout, "visibility", sees_its_future)
    finished, seen = run({**overrides, "attention": "mask", "max_steps": 1})
    assert finished.step == 1
    assert any("tries run on whole rows" in said.text and "layer 0" in said.text for said in seen.of(Message))
    finished, _ = run({**overrides, "attention": "mask", "self_check": False, "max_steps": 1})
    assert finished.step == 1


@pytest.mark.slow
def test_save_strategy_and_limits(overrides: dict[str, object]) -> None:
    def kept(**changes: object) -> list[str]:
        finished, _ = run({**overrides, "max_steps": 6, **changes})
        return sorted(path.name[-2:] for path in (finished.directory / "checkpoints").glob("step-*"))

    assert kept(save_strategy="no") == []
    assert kept(save_strategy="step", steps_freq=2, keep_last_n=2, keep_best_n=0) == ["04", "06"]
    assert kept(save_strategy="step", steps_freq=3, keep_last_n=5, keep_best_n=0) == ["03", "06"]
    assert kept(save_strategy="epoch", batch_size=30, num_epochs=3, epoch_freq=2, keep_best_n=0) == ["04", "06"]


def test_zero_epochs_evaluate_only(overrides: dict[str, object]) -> None:
    finished, recorder = run({**overrides, "num_epochs": 0, "max_steps": None})
    assert finished.adapter is None
    assert finished.before
    assert not recorder.of(StepFinished)


def test_validation_frequency_and_size(overrides: dict[str, object]) -> None:
    _, recorder = run({**overrides, "val_steps_freq": 2, "eval_max_examples": 5, "save_strategy": "no"})
    during = [event for event in recorder.of(Evaluated) if event.when == "during"]
    assert [event.step for event in during] == [2, 4, 6]
    assert {event.num_examples for event in during} == {5}
    assert {event.num_examples for event in recorder.of(Evaluated) if event.when != "during"} == {20}


@pytest.mark.parametrize(
    ("mode", "kinds"),
    [("all", {"gradients", "parameters"}), ("gradients", {"gradients"}), ("parameters", {"parameters"}), (None, set())],
)
def test_histograms_of_the_adapter_come_every_wandb_log_freq_steps(
    mode: str | None, kinds: set[str], overrides: dict[str, object]
) -> None:
    _, recorder = run({**overrides, "wandb_watch_mode": mode, "wandb_log_freq": 2, "max_steps": 5})
    histograms = recorder.of(Histograms)
    assert [event.step for event in histograms] == ([2, 4] if kinds else [])
    assert {name.partition("/")[0] for event in histograms for name in event.arrays} == kinds
    assert all("lora_" in name for event in histograms for name in event.arrays)


def test_resume_option_chooses_the_checkpoint(overrides: dict[str, object]) -> None:
    settings = {**overrides, "save_strategy": "step", "steps_freq": 1, "keep_last_n": 9, "save_optim": True}
    first, _ = run({**settings, "max_steps": 4})
    folder = first.directory / "checkpoints"

    def goes_on_from(**changes: object) -> int:
        _, recorder = run({**settings, "max_steps": 5, "resume_from_checkpoint": True, **changes})
        return int(recorder.of(StepFinished)[0].step) - 1

    path = str(folder / "step-00000002")
    assert goes_on_from(resume_option="path", checkpoint_path=path) == 2
    # The steps beyond it were set aside and taken again, so the newest is now the last of this line.
    assert (folder / "abandoned-1-step-00000004").is_dir()
    assert goes_on_from(max_steps=6) == 5
    lines = [json.loads(line) for line in (first.directory / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval/loss"] for line in lines if line.get("when") == "during"}
    assert goes_on_from(max_steps=7, resume_option="best") == min(losses, key=lambda step: losses[step])


def test_auto_resume_starts_when_there_never_was_a_checkpoint_and_refuses_damage(overrides: dict[str, object]) -> None:
    settings = {**overrides, "resume_from_checkpoint": "auto", "save_optim": True}
    first, recorder = run({**settings, "max_steps": 2})
    assert recorder.of(StepFinished)[0].step == 1
    assert any("no checkpoint yet" in said.text for said in recorder.of(Message))
    weights = first.directory / "checkpoints" / "step-00000002" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError) as caught:
        run({**settings, "max_steps": 4})
    assert caught.value.exit_code == 6
    assert "step-00000002" in str(caught.value)


def test_another_training_is_refused_unless_allowed_by_name(overrides: dict[str, object]) -> None:
    run({**overrides, "max_steps": 2})
    changed = {**overrides, "max_steps": 4, "resume_from_checkpoint": True, "batch_size": 4}
    with pytest.raises(UserError) as caught:
        run(changed)
    assert caught.value.exit_code == 6
    assert "batch_size" in str(caught.value)
    resumed, recorder = run(changed, allowed_changes=frozenset({"batch_size"}))
    assert resumed.step == 4
    assert recorder.of(StepFinished)[0].step == 3


def test_print_examples_shows_labels_before_and_answers_after(overrides: dict[str, object]) -> None:
    _, shown = run({**overrides, "max_steps": 1, "print_examples": True})
    [examples] = shown.of(ExamplesShown)
    assert len(examples.examples) == 3
    assert all(any(is_label for _, is_label in example.pieces) for example in examples.examples)
    told = shown.of(PredictionsShown)
    assert [(len(event.predictions), event.num_shown) for event in told] == [(20, 10), (20, 10)]
    assert told[-1].predictions[0].probabilities
    _, silent = run({**overrides, "max_steps": 1, "print_examples": False})
    assert not silent.of(ExamplesShown)
    assert [(len(event.predictions), event.num_shown) for event in silent.of(PredictionsShown)] == [(20, 0), (20, 0)]


def test_a_save_that_fails_is_told_and_training_goes_on_or_stops(
    overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trietune.io import files

    def full(path: Any) -> None:
        if "step-" in str(path):
            raise OSError(28, "No space left on device", str(path))

    write = files.write_file
    monkeypatch.setattr(files, "write_file", lambda path, *rest: (full(path), write(path, *rest)))
    finished, recorder = run({**overrides, "max_steps": 2, "save_strategy": "step"})
    assert finished.status == "finished"
    assert any("was not saved: No space left" in said.text for said in recorder.of(Message) if said.level == "warning")
    with pytest.raises(UserError, match="was not saved"):
        run({**overrides, "max_steps": 2, "save_strategy": "step", "on_save_error": "stop"})


def test_a_merged_model_is_asked_as_it_was_trained(overrides: dict[str, object], tmp_path: Path) -> None:
    """The prompt format that `--merge` puts beside the weights is read: labels, not a conversation."""
    from trietune.model.adapter.export import export_adapter
    from trietune.run.opened import open_model, predict
    from trietune.tracking.tracker import Tracker

    run = train(load_config(None, overrides))
    assert run.adapter is not None
    merged = export_adapter(run.adapter, tmp_path / "merged", merge=True).folder
    texts = ["a good film", "the plot is dull"]
    small = {"dtype": "float32", "device": "cpu"}
    expected = predict(open_model(run.directory, (), Tracker()), texts)
    found = predict(open_model(merged, small, Tracker()), texts)
    assert [one["label"] for one in found] == [one["label"] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)
