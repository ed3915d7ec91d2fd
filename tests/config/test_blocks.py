"""The original's newest files, and advice that depends on the value of another tool's key."""

from __future__ import annotations

from pathlib import Path

import pytest

from trietune.config import Settings, load_config
from trietune.config.names import nearest_key
from trietune.errors import UserError

NEWEST = """framework: pytorch
use_tt: True
train_file: a.jsonl
run_decode_example: True
save_strategy: none
val_steps_freq: 0
checkpoint_metric: val/accuracy
checkpoint_metric_mode: max
do_validation: True
adam_beta1: 0.8
adam_beta2: 0.95
adam_eps: 1e-6
enable_trace: True
trace_region_size: 10000001
math_fidelity: hifi4
experimental_weight_dtype: bfp8
mesh:
  shape: [8, 1]
  axis_names: [model, batch]
compile: {optimization_level: 1}
logging: {log_level: DEBUG, use_wandb: False, tags: [a]}
metrics: {}
checkpoint: {keep_last_n: 2, path: ""}
"""


def load(folder: Path, text: str, *overrides: str) -> Settings:
    path = folder / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides, {})


def test_the_originals_newest_file_loads_with_a_line_for_each_block(tmp_path: Path) -> None:
    settings = load(tmp_path, NEWEST)
    assert settings.has_original_defaults
    expected = {
        "save_strategy": "no", "val_steps_freq": 0, "checkpoint_metric": "eval/accuracy", "print_examples": True,
        "adam_beta1": 0.8, "adam_eps": 1e-6, "trace_region_size_mb": 11, "mesh_shape": (8, 1),
        "mesh_axis_names": ("model", "batch"), "log_level": "DEBUG", "use_wandb": False, "wandb_tags": ("a",),
        "keep_last_n": 2, "checkpoint_path": "",
        "xla_compile_options": {"math_fidelity": "hifi4", "experimental_weight_dtype": "bfp8", "optimization_level": 1},
    }  # fmt: skip
    assert {key: getattr(settings, key) for key in expected} == expected
    assert settings.where("mesh_shape").endswith("run.yaml, line 17")
    for block in ("mesh", "compile", "logging", "metrics", "checkpoint"):
        assert sum(note.startswith(f"`{block}` ") for note in settings.notes) == 1
    assert any("`math_fidelity`" in note and "Tenstorrent's compiler" in note for note in settings.notes)
    assert not settings.is_validation_due(50)
    assert not settings.is_validation_due(0)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("logging: {frob: 1}\n", ["unknown key `frob`", "the block `logging`", "line 1"]),
        ("mesh: {shape: [1]}\nmesh_shape: [2]\n", ["`mesh_shape` stands in the block `mesh`", "outside of it"]),
        ("logging: True\n", ["unknown key `logging`", "a block of keys there"]),
        ("compile: True\n", ["unknown key `compile`"]),
        ("trace_region_size: 5\ntrace_region_size_mb: 9\nenable_trace: True\n", ["`trace_region_size_mb: 9`"]),
        ("adam_beta1: 0.5\noptim: sgd\n", ["`adam_beta1: 0.5`", "`optim:"]),
        ("do_validation: False\nvalidation_file: b.jsonl\n", ["`do_validation: False`", "`validation_file:"]),
    ],
)
def test_what_is_wrong_with_blocks_is_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        ("lora_target: all", "`lora_target_modules: \"all-linear\"`"),
        ("lora_target: q_proj,v_proj", "`lora_target_modules: \"q_proj,v_proj\"`"),
        ("datasets: [{path: owner/name, type: alpaca}]", "`dataset_id: \"owner/name\"`"),
        ("datasets: [{path: ./rows.jsonl, type: chat_template}]", "`train_file: \"./rows.jsonl\"`"),
        ("dataset: rows.csv", "`train_file: \"rows.csv\"`"),
        ("stage: sft", "`objective: \"sft\"`"),
        ("stage: pt", "a column `text`"),
        ("stage: rm", "no reward models"),
        ("do_train: True", "remove the line"),
        ("bf16: True", "`dtype: \"bfloat16\"`"),
        ("bf16: auto", "`dtype: \"auto\"`"),
        ("bf16: False", "remove the line"),
        ("report_to: none", "`tracker: \"none\"`"),
        ("report_to: [wandb]", "`tracker: \"wandb\"`"),
        ("eval_strategy: \"no\"", "`val_steps_freq: 0`"),
        ("greater_is_better: False", "`checkpoint_metric_mode: \"min\"`"),
        ("load_best_model_at_end: False", "remove the line"),
        ("save_only_model: True", "`save_optim: False`"),
    ],
)  # fmt: skip
def test_advice_follows_the_value_and_works(tmp_path: Path, written: str, advice: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, f"train_file: a.jsonl\n{written}\n")
    assert advice in str(caught.value.next_step)
    if advice.startswith("`"):
        load(tmp_path, f"{advice.strip('`')}\n")


@pytest.mark.parametrize("name", ["use_qalora", "optim_target_modules", "eval_accumulation_steps", "wandb_mode"])
def test_names_of_something_else_are_not_taken_for_ours(tmp_path: Path, name: str) -> None:
    near = nearest_key(name)
    with pytest.raises(UserError) as caught:
        load(tmp_path, f"{name}: 1\n")
    assert "did you mean" not in str(caught.value)
    assert near is None or f"write `{near}" not in str(caught.value)
