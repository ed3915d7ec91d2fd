"""What a release consists of: metadata with links that lead somewhere, workflows, images, the notebook."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _yaml(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path.read_text("utf-8"))


# The package


@pytest.mark.parametrize("repository", ["", "https://example.org/owner/trietune"])
def test_no_link_of_the_packages_readme_is_relative(repository: str) -> None:
    absolute = _module(ROOT / "hatch_build.py").absolute
    text = absolute((ROOT / "README.md").read_text("utf-8"), repository)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert all(target.startswith(("https://", "#")) for target in targets), targets
    if repository:
        assert f"{repository}/raw/main/docs/images/report.png" in targets
        assert f"{repository}/blob/main/docs/data.md" in targets
    assert "ARCHITECTURE.md" in text


def test_classifiers_exist_and_name_every_tested_python() -> None:
    from trove_classifiers import classifiers

    named = PROJECT["project"]["classifiers"]
    assert set(named) <= set(classifiers)
    tested = _yaml(ROOT / ".github/workflows/tests.yml")["jobs"]["fast"]["strategy"]["matrix"]["python"]
    assert {f"Programming Language :: Python :: {version}" for version in tested} <= set(named)


def test_the_versions_of_package_and_citation_are_one() -> None:
    assert str(_yaml(ROOT / "CITATION.cff")["version"]) == PROJECT["project"]["version"]


def test_the_bill_of_materials_names_what_is_locked() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/sbom.py", ROOT / "requirements.lock"], capture_output=True, text=True, check=True
    )
    document = json.loads(done.stdout)
    locked = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text("utf-8"), re.MULTILINE)
    assert [one["name"] for one in document["components"]] == locked
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.5")
    assert all(one["purl"].startswith("pkg:pypi/") for one in document["components"])


# Automation


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_the_least_rights_and_ends_in_time(path: Path) -> None:
    workflow = _yaml(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"] == {"persist-credentials": False}
            # What a stranger writes into a title or a branch name must not become a command.
            assert "github.event" not in step.get("run", "")


def test_publishing_keeps_no_token() -> None:
    text = (ROOT / ".github/workflows/publish.yml").read_text("utf-8")
    job = _yaml(ROOT / ".github/workflows/publish.yml")["jobs"]["publish"]
    assert job["permissions"]["id-token"] == "write"
    assert "secrets." not in text
    assert "password" not in text


def test_make_targets_of_workflows_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for path in WORKFLOWS:
        for target in re.findall(r"run: make (\S+)", path.read_text("utf-8")):
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), (path.name, target)


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[bn]*.yml")), ids=lambda path: path.stem
)
def test_an_issue_form_asks_for_something(path: Path) -> None:
    form = _yaml(path)
    assert form["name"]
    assert form["description"]
    assert all(field["id"] and field["attributes"]["label"] for field in form["body"])


# Images and notebook


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.suffix)
def test_what_an_image_copies_is_there_and_it_runs_as_a_user(path: Path) -> None:
    text = path.read_text("utf-8")
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line[:1].isupper()]
    names = [name for name, _ in steps]
    assert names[0] == "FROM"
    assert dict(steps)["USER"] == "trietune"
    assert dict(steps)["ENTRYPOINT"] == '["trietune"]'
    assert "torch==2.13.0" in text


def test_the_devcontainer_makes_an_environment() -> None:
    content = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text("utf-8"))
    assert content["postCreateCommand"] == "make .venv/.ready"
    assert re.search(r"^\$\(READY\):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


def test_the_notebook_has_no_output_in_it() -> None:
    notebook = json.loads((ROOT / "examples/quickstart.ipynb").read_text("utf-8"))
    assert notebook["nbformat"] == 4
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((ROOT / "examples/quickstart.ipynb").read_text("utf-8"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIETUNE_USE_WANDB", "false")
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    smaller = [
        cell.replace("max_steps=20", "max_steps=2").replace("eval_max_examples=64", "eval_max_examples=8")
        for cell in cells
    ]
    names: dict[str, Any] = {}
    for cell in smaller:
        exec(compile(cell, "quickstart.ipynb", "exec"), names)
    assert names["report"].is_file()
