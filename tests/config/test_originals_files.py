"""The original experiment's files, as they are, and ours beside its command."""

from __future__ import annotations

import os
import runpy
import sys
import types
from pathlib import Path

import pytest

from trietune.config import Settings, load_config
from trietune.config.defaults import run_name_from
from trietune.config.documentation import ORIGINAL_KEYS
from trietune.config.template import TemplateKind, render_template
from trietune.config.yaml12 import read_mapping, write_value
from trietune.errors import UserError
from trietune.run.plan import describe_defaults

ORIGINAL = Path(__file__).parent / "original"
EXPERIMENT = Path(__file__).parents[2] / "blacksmith/experiments/torch/gemma11"
NAMES = ["test_gemma11_finetuning_sst2.yaml", "test_gemma11_finetuning_squadV2.yaml"]


@pytest.mark.parametrize("name", NAMES)
def test_original_file_loads_unmodified_with_every_value(name: str) -> None:
    settings = load_config(ORIGINAL / name, environ={})
    expected = {entry.key: entry.value for entry in read_mapping((ORIGINAL / name).read_text()).entries}
    expected["dtype"] = "bfloat16"
    if expected["lora_target_modules"] == ["all-linear"]:
        expected["lora_target_modules"] = "all-linear"
    public = settings.dump_public()
    assert {key: public[key] for key in expected} == expected
    assert settings.learning_rate == 6e-5
    assert settings.notes == ()


@pytest.mark.parametrize("name", NAMES)
def test_our_commented_file_has_the_originals_values(name: str) -> None:
    ours, original = load_config(EXPERIMENT / name, environ={}), load_config(ORIGINAL / name, environ={})
    assert ours.dump_public() == original.dump_public()
    assert ours.model_fields_set == original.model_fields_set


def test_default_file_is_a_copy_of_the_sst2_file() -> None:
    default = EXPERIMENT / "test_gemma11_finetuning.yaml"
    assert default.read_bytes() == (EXPERIMENT / NAMES[0]).read_bytes()


def test_a_file_that_writes_framework_and_use_tt_keeps_the_originals_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('framework: "pytorch"\nuse_tt: True\n')
    settings, original = load_config(path, environ={}), load_config(ORIGINAL / NAMES[0], environ={})
    assert settings.has_original_defaults
    assert {key: getattr(settings, key) for key in ORIGINAL_KEYS} == {
        key: getattr(original, key) for key in ORIGINAL_KEYS
    }
    assert settings.where("max_length") == "default"
    # Values that do not come from the file do not make it another file.
    path.write_text("framework: pytorch\n")
    assert not load_config(path, ["use_tt=True"], {}).has_original_defaults
    assert not load_config(None, {"framework": "pytorch", "use_tt": True}, {}).has_original_defaults


def test_any_other_file_has_defaults_that_ask_nothing_of_anybody(tmp_path: Path) -> None:
    path = tmp_path / "my reviews.yaml"
    path.write_text("train_file: data/rows.jsonl\nuse_tt: False\n")
    settings = load_config(path, environ={})
    assert not settings.has_original_defaults
    expected = {
        "dataset_id": None, "use_wandb": False, "use_tt": False, "project_dir": "runs", "max_length": "auto",
        "wandb_run_name": "my reviews", "dtype": "auto", "lora_r": 8, "lora_alpha": 16, "learning_rate": 2e-4,
        "batch_size": 16, "wandb_tags": (),
    }  # fmt: skip
    assert {key: getattr(settings, key) for key in expected} == expected
    assert settings.notes == ()
    assert settings.where("wandb_run_name") == "default"
    left = [value for key, value in settings.dump_public().items() if "gemma" in str(value) or "sst" in str(value)]
    assert left == []


@pytest.mark.parametrize(("kind", "shown"), [("sst2", "sst2"), ("jsonl", "jsonl")])
def test_own_defaults_are_what_init_writes(kind: TemplateKind, shown: str) -> None:
    written = {entry.key: entry.value for entry in read_mapping(render_template(kind)).entries}
    settings = Settings()
    for key in ("dtype", "lora_r", "lora_alpha", "learning_rate", "batch_size", "model_name", "project_dir"):
        assert getattr(settings, key) == written[key], (shown, key)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("my/reviews.yaml", "reviews"), ("v1.2.yml", "v1.2"), ("data/train-*.jsonl.gz", "train"), ("data/", "data"),
        ("owner/name:config@main", "name-config"), ("*.jsonl", "run"), ("..", "run"), (".hidden.yaml", "hidden"),
        ("a\nb.yaml", "a-b"), ("x" * 300, "x" * 100),
    ],
)  # fmt: skip
def test_a_run_is_named_after_its_file(source: str, name: str) -> None:
    assert run_name_from(source) == name
    if "\n" not in source:  # which no key takes
        assert load_config(None, {"train_file": source}, {}).wandb_run_name == name


def test_the_originals_command_keeps_the_originals_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("seed: 5\n")
    monkeypatch.setattr(sys, "argv", ["script", str(path), "--show-config"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(EXPERIMENT / "test_gemma11_finetuning.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert left.value.code == 0
    assert "max_length: 32 " in shown
    assert 'wandb_run_name: "tt-gemma11-sst2"' in shown
    assert "TRIETUNE_DEFAULTS" not in os.environ
    assert not load_config(path).has_original_defaults
    with pytest.raises(UserError, match="TRIETUNE_DEFAULTS=originl"):
        load_config(path, environ={"TRIETUNE_DEFAULTS": "originl"})


def test_a_runs_own_file_means_the_same_when_it_is_read_again(tmp_path: Path) -> None:
    """A run folder's `config.yaml` holds every key, `framework` and `use_tt` among them."""
    path = tmp_path / "config.yaml"
    for settings in (Settings(train_file="a.jsonl", wandb_run_name="x"), load_config(ORIGINAL / NAMES[1], environ={})):
        path.write_text("".join(f"{key}: {write_value(value)}\n" for key, value in settings.dump_public().items()))
        again = load_config(path, environ={})
        assert again.dump_public() == settings.dump_public()
        assert "none applies" in describe_defaults(again)


def test_the_original_has_42_keys() -> None:
    assert len(ORIGINAL_KEYS) == 42


def test_no_package_in_the_experiments_branch_can_hide_pytorch() -> None:
    assert not list(EXPERIMENT.parents[2].rglob("__init__.py"))


@pytest.mark.parametrize(
    ("typed", "passed_on"),
    [
        ([], ["train", "DEFAULT"]),
        (["--dry-run", "--set", "seed=1"], ["train", "DEFAULT", "--dry-run", "--set", "seed=1"]),
        (["mine.yaml", "--resume"], ["train", "mine.yaml", "--resume"]),
        (["--set", "train_file=rows.yaml"], ["train", "DEFAULT", "--set", "train_file=rows.yaml"]),
    ],
)
def test_script_passes_everything_on(typed: list[str], passed_on: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    cli = types.ModuleType("trietune.cli.app")
    cli.main = lambda arguments: seen.append(arguments) or 0  # type: ignore[attr-defined, func-returns-value]
    monkeypatch.setitem(sys.modules, "trietune.cli.app", cli)
    monkeypatch.setattr(sys, "argv", ["script", *typed])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(EXPERIMENT / "test_gemma11_finetuning.py"), run_name="__main__")
    assert left.value.code == 0
    default = str(EXPERIMENT / "test_gemma11_finetuning.yaml")
    assert seen == [[default if item == "DEFAULT" else item for item in passed_on]]


def test_script_does_nothing_on_import() -> None:
    modules = set(sys.modules)
    runpy.run_path(str(EXPERIMENT / "test_gemma11_finetuning.py"), run_name="imported")
    assert not {name for name in set(sys.modules) - modules if name.startswith("trietune")}
