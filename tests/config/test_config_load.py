"""Where values come from, how they are spelt, and what is said about the rest."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trietune.config import Settings, load_config, show_config
from trietune.errors import UserError


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_precedence_is_set_then_environment_then_file_then_default(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\nlora_r: 2\nbatch_size: 3\n")
    environ = {"TRIETUNE_SEED": "11", "TRIETUNE_LORA_R": "12", "HOME": "/nowhere"}
    settings = load_config(path, ["seed=21"], environ)
    assert (settings.seed, settings.lora_r, settings.batch_size, settings.num_epochs) == (21, 12, 3, 1)
    assert settings.where("seed") == "--set"
    assert settings.where("lora_r") == "TRIETUNE_LORA_R"
    assert settings.where("batch_size") == f"{path}, line 3"
    assert settings.where("num_epochs") == "default"


def test_last_set_of_a_key_wins() -> None:
    assert load_config(None, ["seed=1", "seed=2"], {}).seed == 2


def test_mapping_of_python_values_is_an_override(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\n")
    settings = load_config(path, {"seed": 2, "train_file": Path("rows.jsonl"), "wandb_tags": ["a", "b"]}, {})
    assert (settings.seed, settings.train_file, settings.wandb_tags) == (2, "rows.jsonl", ("a", "b"))
    assert settings.where("seed") == "argument"


def test_where_of_an_unknown_key_is_an_error() -> None:
    with pytest.raises(KeyError):
        load_config(environ={}).where("lora_rank")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("learning_rate", "6e-5", 6e-5),
        ("learning_rate", "1", 1.0),
        ("steps_freq", "1e3", 1000),
        ("dtype", "torch.bfloat16", "bfloat16"),
        ("dtype", "bf16", "bfloat16"),
        ("dtype", "torch.float32", "float32"),
        ("dtype", "fp16", "float16"),
        ("dtype", "auto", "auto"),
        ("lora_target_modules", '["all-linear"]', "all-linear"),
        ("lora_target_modules", "all-linear", "all-linear"),
        ("lora_target_modules", "q_proj,v_proj", ("q_proj", "v_proj")),
        ("lora_target_modules", "q_proj", ("q_proj",)),
        ("lora_target_modules", ".*[qv]_proj$", ".*[qv]_proj$"),
        ("wandb_tags", "test", ("test",)),
        ("wandb_tags", "[]", ()),
        ("wandb_watch_mode", "null", None),
        ("max_time", "1h30m", 5400.0),
        ("max_time", "90", 90.0),
        ("max_time", "01:30:00", 5400.0),
        ("max_time", "1-00:00:10", 86410.0),
        ("max_time", "0.5h", 1800.0),
        ("max_steps", "-1", None),
        ("max_grad_norm", "0", None),
        ("max_grad_norm", "1", 1.0),
        ("log_level", "debug", "DEBUG"),
        ("checkpoint_metric", "val/loss", "eval/loss"),
        ("lr_scheduler_type", "constant_with_warmup", "constant"),
        ("warmup_steps", "0.1", 0.1),
        ("warmup_steps", "100", 100),
        ("resume_from_checkpoint", "auto", "auto"),
        ("resume_from_checkpoint", "true", True),
        ("eval_max_examples", "64", 64),
        ("prompt_template", "Review: {sentence} # {x}", "Review: {sentence} # {x}"),
        ("prompt_template", r'"Review: {sentence}\nOutput:"', "Review: {sentence}\nOutput:"),
        ("wandb_run_name", "7", "7"),
        ("checkpoint_path", "", ""),
        ("train_file", "", None),
        ("save_strategy", "no", "no"),
        ("model_name", "google/gemma-1.1-2b-it@main", "google/gemma-1.1-2b-it@main"),
    ],
)
def test_spelling_of_a_value_is_normalized(key: str, text: str, value: Any) -> None:
    overrides = [f"{key}={text}"]
    if key == "prompt_template":
        overrides.append("completion_template={label}")
    settings = load_config(None, overrides, {})
    assert getattr(settings, key) == value
    assert type(getattr(settings, key)) is type(value)


@pytest.mark.parametrize("name", ["google/gemma-1.1-1b-it", "gemma-1.1-1b-it"])
def test_unpublished_model_of_the_originals_table_is_replaced_with_one_note(name: str) -> None:
    settings = load_config(None, [f"model_name={name}"], {})
    assert settings.model_name == "google/gemma-1.1-2b-it"
    assert settings.notes == (f"`{name}` was never published; `google/gemma-1.1-2b-it` is used instead",)


def test_settings_without_effect_are_noted() -> None:
    settings = load_config(None, ["load_from_storage=true", "remote_path=/mirror"], {})
    assert settings.notes == (
        "`load_from_storage` is only for resuming: add `--resume`, or `resume_from_checkpoint: auto`",
    )
    assert "remote_path" in load_config(None, ["remote_path=/mirror"], {}).notes[0]


@pytest.mark.parametrize(
    ("overrides", "num_notes"),
    [([], 0), (["use_wandb=True"], 0), (["tracker=trackio"], 0), (["tracker=none", "use_wandb=True"], 1)],
)
def test_a_tracker_that_overrides_use_wandb_is_noted(overrides: list[str], num_notes: int) -> None:
    assert len(load_config(None, overrides, {}).notes) == num_notes


@pytest.mark.parametrize(
    ("overrides", "num_steps", "expected"),
    [
        ([], 1000, 0),
        (["warmup_ratio=0.1"], 1001, 101),
        (["warmup_steps=0.25"], 10, 3),
        (["warmup_steps=7"], 1000, 7),
    ],
)
def test_warm_up_is_counted_in_steps(overrides: list[str], num_steps: int, expected: int) -> None:
    assert load_config(None, overrides, {}).num_warmup_steps(num_steps) == expected


def test_settings_are_frozen_and_take_no_unknown_key() -> None:
    settings = Settings(lora_target_modules=["all-linear"], mesh_shape="8,1")  # type: ignore[arg-type]
    assert (settings.lora_target_modules, settings.mesh_shape) == ("all-linear", (8, 1))
    with pytest.raises(ValueError, match="frozen"):
        settings.seed = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="lora_rank"):
        Settings(lora_rank=3)  # type: ignore[call-arg]


def test_all_problems_of_a_file_are_reported_in_its_order(tmp_path: Path) -> None:
    path = write(tmp_path, "zzz: 1\nbatch_size: 0\nseed: 1\nseed: 2\nwarmup_ratio: 0.1\nwarmup_steps: 10\n")
    with pytest.raises(UserError) as caught:
        load_config(path, environ={})
    message = str(caught.value)
    places = [message.index(text) for text in ("`zzz`", "`batch_size: 0`", "repeated key `seed`", "`warmup_ratio")]
    assert places == sorted(places)
    assert "4 things to correct" in message
    assert caught.value.exit_code == 2


def test_contradiction_is_not_reported_of_a_value_that_is_wrong_itself() -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, ["warmup_ratio=2", "warmup_steps=10"], {})
    assert "excludes" not in str(caught.value)


def test_every_value_with_its_origin_is_shown() -> None:
    text = show_config(load_config(None, ["seed=5"], {"TRIETUNE_DTYPE": "auto"}))
    lines = text.splitlines()
    assert len(lines) == len(Settings.model_fields)
    assert [line.split("# ")[1] for line in lines if line.startswith(("seed:", "dtype:", "lora_r:"))] == [
        "TRIETUNE_DTYPE",
        "default",
        "--set",
    ]
    assert "learning_rate: 2e-4 " in text


@given(st.sampled_from([*Settings.model_fields, "frobnicate"]), st.text(max_size=30))
def test_any_text_for_any_key_is_taken_or_refused_and_never_a_crash(key: str, text: str) -> None:
    with suppress(UserError):
        load_config(None, [f"{key}={text}"], {})


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = write(tmp_path, '"\\e[31mseed": 1\n"\\e[31mseed": 2\noptim: "\\e[2J"\n')
    with pytest.raises(UserError) as caught:
        load_config(path, environ={})
    assert "\x1b" not in str(caught.value)
    assert "seed" in str(caught.value)


SECRETS = [
    ("s3://AKIAABCDEFGHIJKLMNOP:hush@host/runs", "hush"),
    ("https://host/runs?x=1&token=hush&y=2", "hush"),
    ("https://host/runs?X-Amz-Signature=hush", "hush"),
    ("abfs://c@account/runs?sig=hush%2B", "hush"),
    ("hf://hf_hushhushhushhushhush@datasets/x", "hush"),
]


@pytest.mark.parametrize(("address", "secret"), SECRETS)
def test_secrets_in_addresses_are_masked_wherever_settings_are_shown(address: str, secret: str) -> None:
    backend = address.partition("://")[0].replace("abfs", "azure")
    settings = load_config(None, [f"remote_path={address}", f"storage_backend={backend}"], {})
    assert settings.remote_path == address
    assert secret not in show_config(settings)
    assert secret not in str(settings.dump_public())


@pytest.mark.parametrize(("address", "secret"), SECRETS)
def test_secrets_are_masked_in_errors(address: str, secret: str) -> None:
    overrides = [f"remote_path={address}", "storage_backend=gcs", f"seed={address}", f"output_dir={address}"]
    with pytest.raises(UserError) as caught:
        load_config(None, overrides, {})
    assert secret not in str(caught.value)


def test_import_loads_no_torch() -> None:
    script = "import sys, trietune.config, trietune.config.template; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_value_says_everything_when_it_is_read_again() -> None:
    written = [
        {"train_file": "a.jsonl"}, {"tracker": "tensorboard"}, {"train_file": "a.jsonl", "dataset_id": "sst2"},
        {"device": "tt"}, {"tracker": "wandb"}, {},
    ]  # fmt: skip
    for keys in written:
        settings = load_config(overrides=keys, environ={})
        again = load_config(overrides=settings.dump_public(), environ={})
        assert again.dump_public() == settings.dump_public()
        assert again.notes == settings.notes == ()
    first = load_config(overrides=["train_file=a.jsonl"], environ={})
    assert first.dataset_id is None
    assert first.where("dataset_id") == "default"
    with pytest.raises(UserError, match="`dataset_id: null`"):
        load_config(overrides={"dataset_id": None}, environ={})
