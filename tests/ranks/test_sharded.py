"""A base model sharded over processes (FSDP2) trains the adapter that a whole one trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from model.families import FAMILIES
from ranks import jobs
from ranks.pool import Pool
from ranks.test_parity import FP64_TOLERANCE, difference
from ranks.test_runs import ADAPTER_TOLERANCE, METRIC_TOLERANCE, adapter, command_line, differ
from slow_cases import slow_but


@pytest.mark.parametrize("count", [2, 3])
def test_each_process_holds_its_rows_of_the_layers_and_all_of_them_are_the_model(
    pool: Pool, tiny_model: Path, count: int
) -> None:
    found = pool.run(count, jobs.memory_of_layers, str(tiny_model))
    assert all(one["equal"] for one in found)
    assert sum(one["own"] for one in found) == found[0]["whole"]
    assert max(one["own"] for one in found) < 1.2 * found[0]["whole"] / count


@pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "as transformers has them"])
@pytest.mark.parametrize("count", slow_but([2, 3], 2))
def test_a_sharded_run_is_that_of_one_process(
    pool: Pool, overrides: dict[str, object], count: int, is_fused: bool
) -> None:
    # Batches of 2 on 3 processes, and micro-batches of one example or two: parts are empty, and passes unequal.
    settings = {
        **overrides,
        "batch_size": 2,
        "max_tokens_per_micro_batch": 128,
        "max_length": 64,
        "fused_layers": is_fused,
    }
    alone = jobs.whole_run({**settings, "wandb_run_name": "alone"})
    sharded = pool.run(count, jobs.whole_run, {**settings, "parallelism_strategy": "fsdp"})
    assert [one["status"] for one in sharded] == ["finished"] * count, sharded
    assert differ(adapter(sharded[0]), adapter(alone)) < ADAPTER_TOLERANCE
    assert sharded[0]["after"] == pytest.approx(alone["after"], rel=METRIC_TOLERANCE)
    assert proven(sharded[0]) == proven(alone) == 1
    assert any("not checked before training: whether plain PEFT" in text for text in sharded[0]["said"])


def proven(run: dict[str, Any]) -> int:
    """How often it was said that all layers were proven."""
    return sum(text.startswith("self-check: 2 layers and the head give the values and") for text in run["said"])


def test_layers_in_half_precision_are_proven_in_fp32(pool: Pool, overrides: dict[str, object]) -> None:
    settings = {**overrides, "dtype": "bfloat16", "max_steps": 2, "parallelism_strategy": "fsdp"}
    sharded = pool.run(2, jobs.whole_run, settings)
    assert [one["status"] for one in sharded] == ["finished"] * 2, sharded
    assert proven(sharded[0]) == 1


@pytest.mark.parametrize(
    ("family", "count"),
    [
        pytest.param("gemma2", 2, marks=pytest.mark.slow),
        pytest.param("qwen3", 3, marks=pytest.mark.slow),
        ("gemma3", 2),
    ],
)
def test_in_double_precision_the_adapter_is_that_of_a_whole_model(
    pool: Pool, tmp_path: Path, family: str, count: int
) -> None:
    torch.manual_seed(7)
    FAMILIES[family]().save_pretrained(tmp_path)
    whole = jobs.train_folder(str(tmp_path), is_sharded=False)
    sharded = pool.run(count, jobs.train_folder, str(tmp_path), is_sharded=True)
    assert sharded[0]["prunes_last"] == whole["prunes_last"]
    assert whole["prunes_last"] or family == "gemma2"  # whose last layer is not replaced in fp64
    assert sharded[0]["is_let_go"]
    assert difference(sharded[0]["adapter"], whole["adapter"]) < FP64_TOLERANCE
    assert all(one["losses"] == sharded[0]["losses"] for one in sharded)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "count"), [("dpo", 3), ("kto", 2)])
def test_an_objective_of_scores_trains_sharded(pool: Pool, tmp_path: Path, objective: str, count: int) -> None:
    torch.manual_seed(7)
    FAMILIES["llama"]().save_pretrained(tmp_path)
    whole = jobs.train_folder(str(tmp_path), is_sharded=False, objective=objective)
    sharded = pool.run(count, jobs.train_folder, str(tmp_path), is_sharded=True, objective=objective)
    assert sharded[0]["is_let_go"]
    assert difference(sharded[0]["adapter"], whole["adapter"]) < FP64_TOLERANCE


def test_weights_that_are_not_there_are_named(pool: Pool, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    found = pool.run(2, jobs.loading_error, str(tmp_path / "model"))
    assert all("lack" in one and "model.layers.2" in one for one in found)


def test_one_process_cannot_shard(overrides: dict[str, object]) -> None:
    refused = jobs.whole_run({**overrides, "parallelism_strategy": "fsdp"})
    assert refused["error"][2] == 2
    assert "one process was started" in refused["error"][1]


@pytest.mark.parametrize(
    "other", ["load_in_4bit=True", "use_dora=True", "gradient_checkpointing=True", "lora_bias=all"]
)
def test_what_cannot_be_sharded_is_refused_by_name(
    other: str, overrides: dict[str, object], capfd: pytest.CaptureFixture[str]
) -> None:
    from trietune.cli.app import main

    options = command_line({**overrides, "parallelism_strategy": "fsdp"})
    assert main(["train", "--dry-run", "--nproc=2", *options, f"--set={other}"]) == 2
    err = capfd.readouterr().err
    assert "`parallelism_strategy" in err
    assert f"`{other.partition('=')[0]}" in err
