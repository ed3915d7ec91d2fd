"""The original experiment's files, as they are, and ours beside its command."""

from __future__ import annotations

import runpy
import sys
import types
from pathlib import Path

import pytest

from trietune.config import load_config
from trietune.config.documentation import ORIGINAL_KEYS
from trietune.config.yaml12 import read_mapping

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


def test_defaults_are_those_of_the_originals_table() -> None:
    settings, original = load_config(environ={}), load_config(ORIGINAL / NAMES[0], environ={})
    assert {key: getattr(settings, key) for key in ORIGINAL_KEYS} == {
        key: getattr(original, key) for key in ORIGINAL_KEYS
    }


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
