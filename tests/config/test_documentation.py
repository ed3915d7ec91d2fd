"""Reference, schema and templates say what the keys are, because they are made from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from trietune.config import Settings, load_config
from trietune.config.allowed import allowed_values
from trietune.config.documentation import LATER_ORIGINAL_KEYS, ORIGINAL_KEYS, groups, render_documentation
from trietune.config.names import summary
from trietune.config.schema import json_schema
from trietune.config.template import TemplateKind, render_template, template_kinds
from trietune.config.yaml12 import read_mapping

ROOT = Path(__file__).parents[2]
KEYS = sorted(Settings.model_fields)
SCHEMA = json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
REFERENCE = render_documentation()


def test_reference_in_the_repository_is_up_to_date() -> None:
    written = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert written == REFERENCE, "run `python -m trietune.config.documentation`"


def test_every_key_is_in_one_group() -> None:
    grouped = [key for keys in groups().values() for key in keys]
    assert sorted(grouped) == KEYS


def test_keys_of_the_original_exist() -> None:
    assert (ORIGINAL_KEYS | LATER_ORIGINAL_KEYS).issubset(KEYS)
    assert not ORIGINAL_KEYS & LATER_ORIGINAL_KEYS


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_described(key: str) -> None:
    description = Settings.model_fields[key].description
    assert description
    assert description.endswith(".")
    assert len(summary(key)) < 100
    assert allowed_values(key) not in {"", "any value"}
    assert f"### `{key}`" in REFERENCE


def values_of(text: str) -> dict[str, Any]:
    return {entry.key: entry.value for entry in read_mapping(text).entries}


def test_schema_is_one_and_takes_the_originals_files() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert set(SCHEMA["properties"]) == set(KEYS)
    assert not {"ge", "gt", "le", "lt"} & {name for entry in SCHEMA["properties"].values() for name in entry}
    for path in (Path(__file__).parent / "original").glob("*.yaml"):
        jsonschema.validate(values_of(path.read_text()), SCHEMA)


@pytest.mark.parametrize("key", KEYS)
def test_schema_takes_every_default(key: str) -> None:
    VALIDATOR.validate({key: Settings().dump_public()[key]})


@pytest.mark.parametrize(
    "values",
    [{"batch_size": 0}, {"lora_rank": 3}, {"use_wandb": "yes"}, {"dtype": "int8"}, {"learning_rate": 0}],
)
def test_schema_marks_mistakes(values: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, SCHEMA)


@pytest.mark.parametrize("kind", template_kinds())
def test_template_loads_as_it_stands(kind: TemplateKind, tmp_path: Path) -> None:
    text = render_template(kind)
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    settings = load_config(path, environ={})
    assert settings.notes == ()
    assert not settings.use_wandb
    jsonschema.validate(values_of(text), SCHEMA)
    assert text.startswith("# yaml-language-server: $schema=trietune.schema.json\n")


@pytest.mark.parametrize("kind", template_kinds())
def test_commented_keys_of_a_template_have_their_defaults(kind: TemplateKind, tmp_path: Path) -> None:
    lines = render_template(kind).splitlines()
    offered = [line.removeprefix("# ") for line in lines if line.removeprefix("# ").split(": ")[0] in KEYS]
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(offered), encoding="utf-8")
    uncommented = load_config(path, environ={}).dump_public()
    path.write_text("\n".join(lines), encoding="utf-8")
    assert uncommented == load_config(path, environ={}).dump_public()
