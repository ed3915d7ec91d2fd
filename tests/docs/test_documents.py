"""What the documents say is so: commands parse, keys exist, links lead somewhere, tables name everything."""

from __future__ import annotations

import ast
import importlib
import json
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from documents import (
    DECISIONS,
    GUIDES,
    PAGES,
    ROOT,
    Command,
    anchors,
    blocks,
    commands,
    inline_code,
    links,
    name_of,
    section,
)

import trietune
from trietune import errors
from trietune.checkpoints.store import CheckpointStore
from trietune.cli.app import app, main
from trietune.config import Settings, load_config
from trietune.config.documentation import ORIGINAL_KEYS
from trietune.config.not_yet import ELSEWHERE, NOT_YET
from trietune.data.templates import PromptFormat
from trietune.io.manifest import MANIFEST_NAME
from trietune.run.throughput import Throughput
from trietune.trie.dealing import Deal

CLI: Any = typer.main.get_command(app)
COMMANDS_PAGE = ROOT / "docs/commands.md"
MIGRATION = ROOT / "docs/migration.md"
RUN_FOLDER = ROOT / "docs/run-folder.md"
# Words before a colon in backticks that are no keys: the area of a commit.
OTHER_KEYS = {"trie"}


def options_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts if name.startswith("--")} - {"--help"}


def has_placeholder_for_a_command(command: Command) -> bool:
    return command.arguments[0].isupper() or command.arguments[0].startswith("<")


# Commands


@pytest.mark.parametrize("command", commands(), ids=str)
def test_command_lines_parse(command: Command) -> None:
    if has_placeholder_for_a_command(command):
        return
    name, *arguments = command.arguments
    if name.startswith("--"):
        assert name in options_of(CLI)
        return
    assert name in CLI.commands
    if not arguments:
        return  # a command that is only named
    context = CLI.commands[name].make_context(name, [item for item in arguments if item != "..."])
    # What the file of such a command would say.
    load_config(None, context.params.get("overrides") or [], environ={"TRIETUNE_REMOTE_PATH": "copies"})


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 40
    assert {command.page.name for command in commands()} >= {"README.md", "commands.md", "checkpoints.md"}


def test_a_wrong_command_line_would_be_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):
        CLI.commands["train"].make_context("train", ["--dry"])


@pytest.mark.parametrize("name", sorted(CLI.commands))
def test_every_command_and_option_is_documented(name: str) -> None:
    text = section(COMMANDS_PAGE, name)
    documented = set(re.findall(r"--[a-z][a-z-]*", text))
    assert options_of(CLI.commands[name]) <= documented
    others = {"--resume", "--dry-run", "--merge"}  # named in a sentence about another command
    assert documented - options_of(CLI.commands[name]) <= others
    assert re.search(rf"^\| \[`{name}`\]\(#{name}\)", COMMANDS_PAGE.read_text("utf-8"), re.MULTILINE)


def test_options_of_the_program_are_documented() -> None:
    text = COMMANDS_PAGE.read_text("utf-8")
    assert all(option in text for option in options_of(CLI))


def test_every_exit_code_is_documented() -> None:
    table = section(COMMANDS_PAGE, "Exit codes")
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    assert documented == {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


def documented_json_keys(row: str) -> set[str]:
    table = section(COMMANDS_PAGE, "JSON")
    line = re.search(rf"^\| `{row}` \| (.*) \|$", table, re.MULTILINE)
    assert line
    return set(re.findall(r"`(\w+)`", line[1]))


def json_keys(document: Any) -> set[str]:
    if isinstance(document, dict):
        return set(document).union(*(json_keys(value) for value in document.values()))
    return set().union(*(json_keys(item) for item in document)) if isinstance(document, list) else set()


@pytest.fixture
def run_with_a_checkpoint(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("lora_r: 4\n")
    (run / ".run-id").write_text("0123456789abcdef\n")
    store = CheckpointStore(
        run_directory=run, run_id="0123456789abcdef", keep_last_n=3, keep_best_n=3, metric="eval/loss", mode="min"
    )
    store.save(50, {"trainer_state.json": b"{}"}, metrics={"eval/loss": 0.5})
    return run


@pytest.mark.parametrize("name", ["checkpoints", "verify"])
def test_json_has_the_documented_keys(
    name: str, run_with_a_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, str(run_with_a_checkpoint), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.pop("schema_version") == 1
    assert json_keys(document) == documented_json_keys(name)


def printed_keys(function: str) -> set[str]:
    """Keys of the dictionary that a function of `cli/` gives to `print_json`."""
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "src/trietune/cli").glob("*.py")]
    nodes = (node for tree in trees for node in tree.body)
    body = next(node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == function)
    for node in ast.walk(body):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print_json":
            (document,) = node.args
            assert isinstance(document, ast.Dict)
            return {ast.literal_eval(key) for key in document.keys if key is not None}
    raise AssertionError(f"{function} prints no JSON")


@pytest.mark.parametrize(
    ("row", "function", "inner"),
    [
        ("train --dry-run", "_print_plan", set()),
        ("evaluate", "evaluate", set()),
        ("predict", "predict", {"input", "label", "probabilities", "text"}),
    ],
)
def test_documented_json_keys_are_those_that_a_command_prints(row: str, function: str, inner: set[str]) -> None:
    assert documented_json_keys(row) == printed_keys(function) | inner


def test_json_of_doctor_has_the_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.pop("schema_version") == 1
    assert json_keys(document) == documented_json_keys("doctor")


# Keys


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_keys_in_backticks_exist(page: Path) -> None:
    keys = {match[1] for code in inline_code(page) if (match := re.fullmatch(r"([a-z_]+): .+", code))}
    assert keys - OTHER_KEYS <= set(Settings.model_fields)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_yaml_blocks_load(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        file = tmp_path / "config.yaml"
        file.write_text(block, encoding="utf-8")
        load_config(file, environ={})


def test_migration_names_every_key_of_the_original() -> None:
    table = section(MIGRATION, "The 42 keys")
    assert {code for code in re.findall(r"`(\w+)`", table) if code in Settings.model_fields} >= ORIGINAL_KEYS
    assert len(ORIGINAL_KEYS) == 42


def test_migration_names_every_key_that_is_refused() -> None:
    named = set(re.findall(r"`(\w+)", section(MIGRATION, "What is refused, and why")))
    assert set(NOT_YET) | set(ELSEWHERE) <= named


# Files of a run


def test_run_folder_names_every_training_metric() -> None:
    step: Any = SimpleNamespace(
        loss=1.0, learning_rate=1.0, grad_norm=1.0, sequence_indices=np.arange(2), num_positions=3, num_tokens=4,
        num_labels=5, num_micro_batches=1, metrics={},
    )  # fmt: skip
    throughput = Throughput()
    throughput.start()
    named = set(re.findall(r"`([\w/]+)`", section(RUN_FOLDER, "metrics.jsonl")))
    parts = (np.zeros(1, np.int64), np.zeros(1, np.int64))
    step.deal = Deal(parts=parts, costs=np.ones(2), cost_of_whole=2.0, num_labels=1)
    assert set(throughput.metrics(step, 0, num_compilations=1)) <= named


def test_run_folder_names_every_key_of_the_prompt_format() -> None:
    named = set(re.findall(r"`(\w+)`", section(RUN_FOLDER, "The adapter")))
    assert {field.name for field in fields(PromptFormat)} | {"format_version"} <= named


def test_run_folder_names_every_key_of_a_manifest(run_with_a_checkpoint: Path) -> None:
    manifest = json.loads((run_with_a_checkpoint / "checkpoints/step-00000050" / MANIFEST_NAME).read_text())
    named = set(re.findall(r"`(\w+)`", section(RUN_FOLDER, "manifest.json")))
    assert set(manifest) <= named


# Links, code, form


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{name_of(page)} links to {link}"
        assert not anchor or anchor in anchors(path), f"{name_of(page)} links to {link}, which has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_compile_and_import_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trietune"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, name.name) for name in node.names)


def test_the_public_interface_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    functions = [name for name in trietune.__all__ if name[0].islower() and not name.startswith("_")]
    assert functions
    assert all(name in text for name in functions)


@pytest.mark.parametrize("guide", GUIDES, ids=name_of)
def test_guides_end_with_a_next_step(guide: Path) -> None:
    assert guide.read_text("utf-8").rpartition("\n## ")[2].startswith("Next\n")


def test_architecture_names_every_module_and_folder() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    modules = [path.name for path in (ROOT / "src/trietune").glob("*.py") if not path.name.startswith("__")]
    folders = [f"{path.parent.name}/" for path in (ROOT / "src/trietune").glob("*/*.py")]
    assert [name for name in sorted({*modules, *folders}) if f"`{name}`" not in text] == []


def test_decisions_are_numbered_and_dated() -> None:
    for number, page in enumerate(DECISIONS, start=1):
        title, _, date, *_ = page.read_text("utf-8").splitlines()
        assert page.name.startswith(f"{number:04d}-")
        assert title.startswith(f"# {number}. ")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d, (accepted|replaced by .*)", date)
        assert "**What would change our mind.**" in page.read_text("utf-8")


def test_readme_keeps_its_place_for_measured_speed() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    begin, end = text.index("<!-- speed table: begin -->"), text.index("<!-- speed table: end -->")
    assert begin < text.index("| workload |") < end


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_nothing_of_the_writers_machine_is_in_a_page(page: Path) -> None:
    assert not re.search(r"(?<![\w.])/(?:work|tmp|root|home)/", page.read_text("utf-8"))
