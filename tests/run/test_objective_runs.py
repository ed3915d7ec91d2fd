"""Whole runs of a tiny model under each objective: they learn what they should, and stop and go on like any run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from run.conftest import PRAISE, WORDS
from run.test_run import Recorder, adapter_of, largest_difference, run
from run.test_static_run import static_cpu
from trietune import UserError, load_config
from trietune.run.opened import evaluate
from trietune.tracking.events import Evaluated, Message, RunStarted, StepFinished
from trietune.tracking.tracker import Tracker

SLOW = pytest.mark.slow
OBJECTIVES = ("dpo", *(pytest.param(name, marks=SLOW) for name in ("ipo", "simpo", "orpo")), "kto")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sentence(draw: random.Random, pool: list[str]) -> str:
    return " " + " ".join(draw.choice(pool) for _ in range(draw.randint(2, 5)))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.jsonl` (48 rows) and `valid.jsonl` (16): praise is chosen, blame is rejected; prompts repeat."""
    folder = tmp_path_factory.mktemp("pairs")
    draw = random.Random(7)
    prompts = [f"the {draw.choice(WORDS)} {draw.choice(WORDS)}:" for _ in range(6)]
    blame = ["bad", "dull", "poor"]
    for name, size in (("train.jsonl", 48), ("valid.jsonl", 16)):
        rows = []
        for number in range(size):
            common = sentence(draw, ["the", "film", "plot"])
            rows.append(
                {
                    "prompt": prompts[number % 6],
                    "chosen": common + sentence(draw, sorted(PRAISE)),
                    "rejected": common + sentence(draw, blame),
                }
            )
        write(folder / name, rows)
    return folder


@pytest.fixture
def preferences(overrides: dict[str, object], pairs: Path) -> dict[str, object]:
    return {**overrides, "train_file": str(pairs / "train.jsonl"), "validation_file": str(pairs / "valid.jsonl")}


def evaluations(recorder: Recorder) -> dict[str, Evaluated]:
    return {event.when: event for event in recorder.of(Evaluated)}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_learns_to_prefer(objective: str, preferences: dict[str, object]) -> None:
    finished, recorder = run({**preferences, "objective": objective, "max_steps": 30, "num_epochs": 5})
    seen = evaluations(recorder)
    before, after = seen["before"].metrics, seen["after"].metrics
    assert after["eval/loss"] < before["eval/loss"]
    assert seen["after"].num_examples == (32 if objective == "kto" else 16)
    if objective != "kto":
        # By sums of log-probabilities a short answer has the advantage, however much a model has learned.
        assert before["eval/preference_accuracy"] < after["eval/preference_accuracy"]
        low, high = seen["after"].intervals["eval/preference_accuracy"]
        assert low < after["eval/preference_accuracy"] <= high
        assert after["eval/rewards/accuracies"] > 0.9
    assert after["eval/rewards/margins"] > 0
    assert after["eval/rewards/chosen"] > after["eval/rewards/rejected"]
    steps = recorder.of(StepFinished)
    assert {"train/rewards/margins", "train/logps/chosen", "train/logps/rejected"} <= steps[-1].metrics.keys()
    assert (finished.directory / "adapter" / "adapter_model.safetensors").is_file()
    batches = [json.loads(line)["ids"] for line in (finished.directory / "batches.jsonl").read_text().splitlines()]
    suffixes = (" chosen", " rejected") if objective == "kto" else ("",)
    assert sorted(batches[0] + batches[1])[0].startswith("train.jsonl:")
    assert all(one.endswith(suffixes) for batch in batches for one in batch)
    assert len(batches[0]) == 8


def test_before_training_the_model_is_its_own_reference(preferences: dict[str, object]) -> None:
    _, recorder = run({**preferences, "objective": "dpo"})
    before = evaluations(recorder)["before"].metrics
    assert before["eval/loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert not any(name.startswith("eval/rewards/") for name in before)


@pytest.mark.slow
def test_a_cut_batch_and_accumulated_ones_train_the_same(preferences: dict[str, object]) -> None:
    settings = {**preferences, "objective": "dpo", "learning_rate": 1e-3, "pack_weights": False}
    whole, _ = run({**settings, "wandb_run_name": "whole"})
    cut, recorder = run({**settings, "wandb_run_name": "cut", "max_tokens_per_micro_batch": 48, "max_length": 48})
    assert max(event.metrics["num_micro_batches"] for event in recorder.of(StepFinished)) > 1
    halves, _ = run({**settings, "wandb_run_name": "halves", "batch_size": 4, "gradient_accumulation_steps": 2})
    assert largest_difference(adapter_of(whole), adapter_of(cut)) < 1e-4
    # Another batch size groups other prompts, so only that both learn the same kind of thing is compared here.
    assert halves.step == whole.step


def test_a_stopped_run_goes_on_bit_for_bit(preferences: dict[str, object]) -> None:
    settings = {
        **preferences, "objective": "dpo", "save_optim": True, "save_strategy": "step", "steps_freq": 3,
        "deterministic": True, "max_tokens_per_micro_batch": 512, "pack_weights": False,
    }  # fmt: skip
    whole, _ = run({**settings, "wandb_run_name": "whole"})
    run({**settings, "wandb_run_name": "half", "max_steps": 3})
    resumed, recorder = run({**settings, "wandb_run_name": "half", "resume_from_checkpoint": True})
    assert resumed.step == 6
    assert largest_difference(adapter_of(whole), adapter_of(resumed)) == 0
    assert not any("reference" in event.text for event in recorder.of(Message))


@pytest.mark.slow
def test_a_resume_without_the_cache_scores_the_start_again(
    preferences: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**preferences, "objective": "dpo", "save_optim": True, "save_strategy": "step", "steps_freq": 3}
    whole, _ = run({**settings, "wandb_run_name": "whole"})
    run({**settings, "wandb_run_name": "half", "max_steps": 3})
    monkeypatch.setenv("TRIETUNE_CACHE", str(tmp_path / "another"))
    resumed, _ = run({**settings, "wandb_run_name": "half", "resume_from_checkpoint": True})
    assert largest_difference(adapter_of(whole), adapter_of(resumed)) < 1e-5


def test_a_resume_under_another_objective_is_refused(preferences: dict[str, object]) -> None:
    settings = {**preferences, "save_strategy": "step", "steps_freq": 3}
    run({**settings, "objective": "dpo", "max_steps": 3})
    with pytest.raises(UserError, match="objective"):
        run({**settings, "objective": "ipo", "resume_from_checkpoint": True})


def test_a_checkpoint_older_than_a_key_counts_as_at_its_default(
    overrides: dict[str, object], pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trietune.run.saving import RunFiles

    settings = {**overrides, "save_strategy": "step", "steps_freq": 3}
    new = ("objective", "dpo_beta", "rank_by", "init_adapter")
    details = RunFiles.details
    monkeypatch.setattr(RunFiles, "details", lambda self: {k: v for k, v in details(self).items() if k not in new})
    run({**settings, "max_steps": 3})
    monkeypatch.setattr(RunFiles, "details", details)
    with pytest.raises(UserError, match="objective") as refused:
        run({**settings, "objective": "rank", "resume_from_checkpoint": True})
    assert "sft" in str(refused.value)
    _, recorder = run({**settings, "resume_from_checkpoint": True})
    assert not any(name in event.text for event in recorder.of(Message) for name in new)


def test_memory_that_runs_out_halves_the_micro_batches(
    preferences: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from trietune.model.causal_lm import TrieModel

    label_losses = TrieModel.label_losses
    most = 150
    refused: list[int] = []

    def starved(self: TrieModel, micro_batch: Any) -> torch.Tensor:
        if self.network.training and micro_batch.num_positions > most:
            refused.append(micro_batch.num_positions)
            raise torch.OutOfMemoryError("out of memory")
        return label_losses(self, micro_batch)

    settings = {**preferences, "objective": "dpo", "learning_rate": 1e-3, "pack_weights": False, "batch_size": 16}
    settings["max_steps"] = 3
    whole, _ = run({**settings, "wandb_run_name": "whole"})
    monkeypatch.setattr(TrieModel, "label_losses", starved)
    halved, _ = run({**settings, "wandb_run_name": "halved"})
    assert refused
    assert largest_difference(adapter_of(whole), adapter_of(halved)) < 1e-4


def test_an_adapter_to_start_from_is_also_the_reference(
    preferences: dict[str, object], overrides: dict[str, object]
) -> None:
    first, _ = run({**overrides, "wandb_run_name": "first"})
    for key in ("init_adapter", "sft_checkpoint_path"):
        settings = {**preferences, "objective": "dpo", key: str(first.directory), "wandb_run_name": key}
        second, recorder = run({**settings, "learning_rate": 1e-9, "max_steps": 1})
        assert largest_difference(adapter_of(first), adapter_of(second)) < 1e-6
        assert evaluations(recorder)["before"].metrics["eval/loss"] == pytest.approx(0.6931472, abs=1e-5)


def test_an_adapter_of_another_rank_is_refused_with_what_to_write(
    preferences: dict[str, object], overrides: dict[str, object]
) -> None:
    first, _ = run({**overrides, "wandb_run_name": "first", "max_steps": 1})
    with pytest.raises(UserError, match="`lora_r` is 8 there and 4 here") as refused:
        run({**preferences, "objective": "dpo", "init_adapter": str(first.directory), "lora_r": 4})
    assert "lora_r=8" in str(refused.value)


def test_an_adapter_to_start_from_brings_its_rank_and_targets(
    preferences: dict[str, object], overrides: dict[str, object]
) -> None:
    shape = {"lora_r": 3, "lora_alpha": 5, "lora_target_modules": ["q_proj"]}
    first, _ = run({**overrides, **shape, "wandb_run_name": "first", "max_steps": 1})
    settings = {**preferences, "init_adapter": str(first.directory), "objective": "dpo", "wandb_run_name": "second"}
    second, _ = run({**settings, "max_steps": 1, "learning_rate": 1e-9})
    assert largest_difference(adapter_of(first), adapter_of(second)) < 1e-6
    kept = load_config(second.directory / "config.yaml", environ={})
    assert (kept.lora_r, kept.lora_alpha, kept.lora_target_modules) == (3, 5, ("q_proj",))
    with pytest.raises(UserError, match="`lora_r` is 3 there and 8 here"):
        run({**settings, "lora_r": 8})


def test_ranking_trains_what_evaluation_measures(overrides: dict[str, object]) -> None:
    _, recorder = run({**overrides, "objective": "rank", "max_steps": 16, "num_epochs": 3, "learning_rate": 5e-3})
    seen = evaluations(recorder)
    assert seen["after"].metrics["eval/accuracy"] > seen["before"].metrics["eval/accuracy"]
    steps = recorder.of(StepFinished)
    assert steps[-1].metrics["train/loss"] < steps[0].metrics["train/loss"]
    assert "train/accuracy" in steps[-1].metrics


def test_ranking_takes_more_labels_than_a_task_is_guessed_from(overrides: dict[str, object], tmp_path: Path) -> None:
    rows = [{"prompt": f"{WORDS[n % 20]} {WORDS[(n * 7) % 20]}:", "completion": f" {n % 30}"} for n in range(60)]
    settings = {
        **overrides,
        "dataset_id": None,
        "train_file": write(tmp_path / "many.jsonl", rows),
        "validation_file": None,
    }
    with pytest.raises(UserError, match="no training example has"):
        run(
            {
                **settings,
                "objective": "rank",
                "validation_file": write(tmp_path / "v.jsonl", [{"prompt": "a", "completion": " 99"}]),
            }
        )
    settings["validation_file"] = write(tmp_path / "valid.jsonl", rows[:10])
    _, recorder = run({**settings, "objective": "rank", "max_steps": 2})
    assert "eval/accuracy" in evaluations(recorder)["after"].metrics


def test_ranking_refuses_answers_that_are_no_labels(overrides: dict[str, object], questions: Path) -> None:
    settings = {**overrides, "train_file": str(questions / "train.json"), "validation_file": None, "objective": "rank"}
    with pytest.raises(UserError, match="labels of a task"):
        run({**settings, "dataset_id": "squad_v2"})


def test_a_run_is_evaluated_on_its_preferences(preferences: dict[str, object]) -> None:
    finished, recorder = run({**preferences, "objective": "simpo", "max_steps": 8})
    found = evaluate(finished.directory)
    after = evaluations(recorder)["after"].metrics
    assert found.metrics["eval/preference_accuracy"] == after["eval/preference_accuracy"]
    assert found.metrics["eval/loss"] == pytest.approx(after["eval/loss"], abs=1e-4)
    assert "eval/preference_accuracy" in found.intervals


def test_evaluation_without_a_reference_says_what_it_cannot_tell(preferences: dict[str, object]) -> None:
    finished, recorder = run({**preferences, "objective": "dpo", "max_steps": 2})
    watcher = Recorder()
    found = evaluate(finished.directory, tracker=Tracker([watcher]))
    after = evaluations(recorder)["after"].metrics
    assert found.metrics.keys() == {"eval/preference_accuracy", "eval/logps/chosen", "eval/logps/rejected"}
    assert found.metrics["eval/logps/chosen"] == pytest.approx(after["eval/logps/chosen"], rel=1e-5)
    assert any("compare with the model before training" in event.text for event in watcher.of(Message))


def test_a_base_model_is_measured_on_preferences(preferences: dict[str, object], tiny_model: Path) -> None:
    names = ("train_file", "validation_file", "max_length", "dtype", "device")
    overrides = {**{name: preferences[name] for name in names}, "objective": "orpo"}
    found = evaluate(tiny_model, overrides=overrides)
    assert 0 <= found.metrics["eval/preference_accuracy"] <= 1
    assert found.metrics["eval/loss"] > found.metrics["eval/nll_loss"]


def test_a_checkpoint_is_ranked_by_a_metric_of_preferences(preferences: dict[str, object]) -> None:
    settings = {**preferences, "objective": "dpo", "checkpoint_metric": "eval/rewards/margins"}
    finished, _ = run({**settings, "checkpoint_metric_mode": "max", "save_strategy": "step", "steps_freq": 3})
    manifests = sorted((finished.directory / "checkpoints").glob("*/manifest.json"))
    assert all("eval/rewards/margins" in json.loads(path.read_text())["metrics"] for path in manifests)
    with pytest.raises(UserError, match="checkpoint_metric_mode"):
        load_config(None, {"checkpoint_metric": "eval/rewards/margins", "checkpoint_metric_mode": "min"})


def test_the_chosen_answers_own_loss_is_added(preferences: dict[str, object]) -> None:
    _, plain = run({**preferences, "objective": "dpo", "max_steps": 1, "wandb_run_name": "plain"})
    _, added = run({**preferences, "objective": "dpo", "sft_weight": 0.5, "max_steps": 1, "wandb_run_name": "added"})
    steps = [recorder.of(StepFinished)[0].metrics for recorder in (plain, added)]
    expected = steps[0]["train/loss"] + 0.5 * steps[1]["train/nll_loss"]
    assert steps[1]["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_dropout_does_not_stop_a_cut_batch(preferences: dict[str, object]) -> None:
    settings = {**preferences, "objective": "dpo", "lora_dropout": 0.2, "max_steps": 2, "max_length": 48}
    finished, recorder = run({**settings, "max_tokens_per_micro_batch": 48})
    assert finished.step == 2
    assert recorder.of(StepFinished)[0].metrics["num_micro_batches"] > 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"objective": "simpo", "dpo_beta": 0.3}, "dpo_beta"),
        ({"sft_weight": 0.3}, "sft_weight"),
        ({"objective": "dpo", "rank_by": "mean"}, "rank_by"),
        ({"objective": "dpo", "completion_template": " {a}"}, "completion_template"),
        ({"objective": "dpo", "init_adapter": "a", "sft_checkpoint_path": "b"}, "means the same as"),
        ({"objective": "dpq"}, "dpo"),
        ({"loss_type": "sigmoid"}, "objective: dpo"),
        ({"beta": 0.2}, "dpo_beta: 0.2"),
        ({"rl": "dpo"}, "objective"),
        ({"stage": "dpo"}, 'objective: "dpo"'),
        ({"pref_beta": 0.2}, "dpo_beta: 0.2"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(None, settings)
    assert says in str(refused.value)


def test_a_default_value_beside_another_objective_is_no_mistake() -> None:
    assert load_config(None, {"objective": "simpo", "dpo_beta": 0.1}).objective == "simpo"


def test_weights_change_what_is_learned_and_the_plan_says_so(overrides: dict[str, object], tmp_path: Path) -> None:
    rows = [{"prompt": f"{word}:", "completion": f" {'good' if n % 2 else 'bad'}"} for n, word in enumerate(WORDS)]
    settings = {**overrides, "max_steps": 3, "validation_file": write(tmp_path / "v.jsonl", rows)}
    adapters = []
    for name, weight in (("ones", 1), ("twos", 2), ("signed", None)):
        weighted = [{**row, "weight": weight or (1 - n % 3)} for n, row in enumerate(rows)]
        found, recorder = run(
            {
                **settings,
                "dataset_id": None,
                "train_file": write(tmp_path / f"{name}.jsonl", weighted),
                "wandb_run_name": name,
            }
        )
        plan = dict(recorder.of(RunStarted)[0].plan)
        assert plan["objective"] == "sft, the loss of each label times its `weight`"
        adapters.append((adapter_of(found), recorder.losses))
    plain, recorder = run(
        {**settings, "dataset_id": None, "train_file": write(tmp_path / "plain.jsonl", rows), "wandb_run_name": "plain"}
    )
    assert largest_difference(adapters[0][0], adapter_of(plain)) == 0
    assert adapters[1][1][0] == pytest.approx(2 * recorder.losses[0], rel=1e-5)
    assert largest_difference(adapters[2][0], adapter_of(plain)) > 1e-3


@pytest.mark.parametrize("objective", [pytest.param("dpo", marks=SLOW), "kto", pytest.param("rank", marks=SLOW)])
def test_a_device_of_static_shapes_learns_the_same(
    objective: str, preferences: dict[str, object], overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**(overrides if objective == "rank" else preferences), "objective": objective, "learning_rate": 1e-3}
    plain, _ = run({**settings, "wandb_run_name": "plain"})
    for num_rows in (1, 2):
        monkeypatch.setattr("trietune.run.opening.choose_device", lambda *_, n=num_rows, **__: static_cpu(num_rows=n))
        static, recorder = run({**settings, "wandb_run_name": f"static-{num_rows}"})
        assert largest_difference(adapter_of(plain), adapter_of(static)) < 1e-4
        assert recorder.of(StepFinished)[-1].metrics["train/loss"] is not None
