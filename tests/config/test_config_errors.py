"""The message that each mistake gets, word by word: read `tests/golden/config_errors.txt`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from trietune.config import Settings, load_config
from trietune.config.foreign import FOREIGN_NAMES
from trietune.config.not_yet import ELSEWHERE, NOT_YET
from trietune.errors import UserError

# What a person typed; a file `run.yaml` unless the mistake lies elsewhere.
FILES: Mapping[str, str | bytes] = {
    "misspelt key": "batch_sise: 4\n",
    "words of a key in another order": "length_max: 32\n",
    "key with a hyphen and capitals": "LoRA-r: 8\n",
    "key that resembles nothing": "frobnicate: 4\n",
    "a batch size per device": "per_device_train_batch_size: 8\n",
    "a rank by another tool's name": "lora_rank: 16\n",
    "an interval by another tool's name": "save_steps: 500\n",
    "labels on prompts, which are never learned": "train_on_inputs: false\n",
    "a secret in the file": "hf_token: hf_abcdefghijklmnopqrstuvwxyz\n",
    "repeated key": "seed: 1\nlora_r: 4\nseed: 2\n",
    "tag": "seed: !!python/object:os.system 3\n",
    "anchor and alias": "lora_r: &r 4\nlora_alpha: *r\n",
    "empty value": "learning_rate:\n",
    "wrong type": "batch_size: four\n",
    "number in quotes": 'max_steps: "100"\n',
    "fraction of a whole number": "batch_size: 2.5\n",
    "out of range": "batch_size: 0\n",
    "minus forgotten in an exponent": "learning_rate: 6e5\n",
    "not a number": "learning_rate: .nan\n",
    "word of YAML 1.1 for True": "use_wandb: yes\n",
    "number for a truth value": "deterministic: 1\n",
    "unknown choice": "save_strategy: steps\n",
    "unknown optimizer": "optim: lion\n",
    "number format that cannot train": "dtype: torch.int8\n",
    "framework that is not there": "framework: jax\n",
    "full training": "training_type: full\n",
    "task type that is not there": "lora_task_type: SEQ_CLS\n",
    "metric of training for ranking": "checkpoint_metric: train/loss\n",
    "all-linear among others": 'lora_target_modules: ["all-linear", "q_proj"]\n',
    "pattern that does not compile": 'lora_target_modules: ".*(q_proj"\n',
    "run name with a slash": "wandb_run_name: a/b\n",
    "nothing in a word of Python": "wandb_watch_mode: None\n",
    "time that is none": "max_time: soon\n",
    "path without a path": "resume_option: path\ncheckpoint_path: ''\n",
    "upload without a place": "sync_to_storage: True\n",
    "address of another storage": "storage_backend: s3\nremote_path: gs://bucket/run\n",
    "two kinds of warm-up": "warmup_ratio: 0.1\nwarmup_steps: 100\n",
    "worst checkpoint as the best": "checkpoint_metric: eval/accuracy\n",
    "prompt without completion": 'prompt_template: "{question}"\n',
    "weights over several devices": "parallelism_strategy: fsdp\nmesh_shape: 8,1\n",
    "key of the original's later files": "custom_dataset: {file_type: json}\n",
    "empty file": "",
    "comments alone": "# seed: 3\n",
    "a list": "- seed: 3\n",
    "a sentence": "train the model\n",
    "no colon": "seed: 1\nlora_r\n",
    "two colons": "prompt_template: Review: {sentence}\n",
    "list that is not closed": "seed: 1\nwandb_tags: [a, b\nlora_r: 4\n",
    "tab": "\tseed: 1\n",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "not UTF-8": b"seed: 1\nwandb_run_name: caf\xe9\n",
    "a model in place of a configuration": b"GGUF" + bytes(1_000_001),
    "several mistakes at once": (
        "model_name_or_path: google/gemma-1.1-2b-it\nbatch_size: 0\nseed: 1\nseed: 2\nuse_wandb: off\n"
        "output_dir: out\nresume_option: path\n"
    ),
}
OVERRIDES: Mapping[str, tuple[Sequence[str], Mapping[str, str]]] = {
    "--set without a value": (["seed"], {}),
    "--set of an unknown key": (["learningrate=1e-4"], {}),
    "--set of a wrong value": (["seed=-1"], {}),
    "--set that is no YAML": (["wandb_watch_mode=[a"], {}),
    "variable of an unknown key": ([], {"TRIETUNE_SEEDS": "1"}),
    "variable with a wrong value": ([], {"TRIETUNE_USE_WANDB": "0"}),
    "contradiction between command line and environment": (["num_epochs=0"], {"TRIETUNE_MAX_STEPS": "5"}),
}


def message_of(path: Path | None, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides, environ or {})
    assert caught.value.exit_code == 2
    assert caught.value.next_step
    return str(caught.value)


def test_each_mistake_has_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Callable[[str, str], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("run.yaml")
    parts = []
    for title, text in FILES.items():
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        parts.append(f"# {title}\n{message_of(path)}\n")
    for title, (overrides, environ) in OVERRIDES.items():
        parts.append(f"# {title}\n{message_of(None, overrides, environ)}\n")
    parts.append(f"# file that is not there, but nearly\n{message_of(Path('rum.yaml'))}\n")
    parts.append(f"# file that is not there\n{message_of(Path('elsewhere/sst2.yaml'))}\n")
    parts.append(f"# folder\n{message_of(Path())}\n")
    os.mkfifo("pipe")
    parts.append(f"# pipe\n{message_of(Path('pipe'))}\n")
    golden("config_errors.txt", "\n".join(parts))


@pytest.mark.parametrize("name", sorted(FOREIGN_NAMES))
def test_foreign_name_is_answered_with_ours(name: str) -> None:
    message = message_of(None, [f"{name}=8"])
    assert f"unknown key `{name}`" in message
    foreign = FOREIGN_NAMES[name]
    assert foreign.tools in message
    assert all(f"`{key}`" in message for key in foreign.keys)
    assert foreign.difference in message
    assert "{" not in message


def test_foreign_names_are_none_of_ours_and_point_to_ours() -> None:
    assert not set(FOREIGN_NAMES) & set(Settings.model_fields)
    assert all(key in Settings.model_fields for foreign in FOREIGN_NAMES.values() for key in foreign.keys)


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["completion_template={a}"], ["completion_template", "prompt_template"]),
        (["chat_template=x", "prompt_template=a", "completion_template=b"], ["chat_template", "prompt_template"]),
        (["modules_to_save=q_proj", "lora_target_modules=q_proj,v_proj"], ["modules_to_save", "lora_target_modules"]),
        (["warmup_steps=10", "max_steps=10"], ["warmup_steps", "max_steps"]),
        (["batching=padded", "attention=rows"], ["attention", "batching"]),
        (["batching=packed", "group_by_prefix=true"], ["group_by_prefix", "batching"]),
        (["max_tokens_per_micro_batch=16", "max_length=32"], ["max_tokens_per_micro_batch", "max_length"]),
        (["use_wandb=false", "tracker=wandb"], ["tracker", "use_wandb"]),
        (["use_wandb=false", "model_to_wandb=true"], ["model_to_wandb", "use_wandb"]),
        (
            ["checkpoint_path=/x", "resume_from_checkpoint=true"],
            ["checkpoint_path", "resume_option"],
        ),
        (["checkpoint_metric_mode=max"], ["checkpoint_metric_mode", "checkpoint_metric"]),
        (["load_from_storage=true"], ["load_from_storage", "remote_path"]),
        (["dtype=float16", "device=cpu"], ["dtype", "device"]),
        (["optim=adamw_8bit", "device=cpu"], ["optim", "device"]),
        (["use_tt=false", "device=tt"], ["device", "use_tt"]),
        (["mesh_shape=8,1", "mesh_axis_names=[data]"], ["mesh_shape", "mesh_axis_names"]),
        (["mesh_axis_names=[data]"], ["mesh_axis_names", "mesh_shape"]),
        (
            ["tp_sharding_specs={a: b}", "model_sharding_patterns={a: b}"],
            ["tp_sharding_specs", "model_sharding_patterns"],
        ),
        (["trace_region_size_mb=8"], ["trace_region_size_mb", "enable_trace"]),
        (["parallelism_strategy=fsdp", "mesh_shape=8,1"], ["parallelism_strategy", "mesh_shape"]),
        (["parallelism_strategy=fsdp", "use_dora=true"], ["parallelism_strategy", "use_dora"]),
    ],
)
def test_contradiction_names_both_keys_and_their_places(overrides: list[str], keys: list[str]) -> None:
    lines = message_of(None, overrides).splitlines()
    naming = [line for line in lines if line.count("(--set)") + line.count("(default)") == 2]
    assert len(naming) == 1
    assert all(f"`{key}" in naming[0] for key in keys)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("custom_dataset", "{file_type: json}"),
        ("prompt_format", "alpaca"),
        ("chat_system_prompt", "Be brief."),
        ("unfreeze_embeddings", "true"),
        ("adapter_layers", "[1, 2]"),
        ("adapter_bottleneck_dim", "64"),
        ("run_decode_example", "true"),
        ("test_config", "{max_steps_per_epoch: 3}"),
    ],
)
def test_key_that_this_build_cannot_honor_is_refused_by_name(key: str, value: str) -> None:
    refusal = {**NOT_YET, **ELSEWHERE}.get(key)
    if refusal is None:
        pytest.skip("built by now")
    message = message_of(None, [f"{key}={value}"])
    assert f"`{key}: " in message
    assert refusal.reason in message
    assert refusal.remedy in message


@pytest.mark.parametrize("key", sorted({**NOT_YET, **ELSEWHERE}))
def test_refused_key_is_accepted_at_its_default(key: str) -> None:
    load_config(None, {key: Settings.model_fields[key].default}, {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\n")
    path.chmod(0)
    assert "Permission denied" in message_of(path)
