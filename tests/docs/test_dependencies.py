"""What the package imports is declared, what is declared is imported."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# A device's vendor installs it, in a version that fits the device; docs/devices.md says how.
INSTALLED_WITH_THE_DEVICE = {"torch-xla"}
# Imported where a notebook has it running already.
THE_NOTEBOOKS_OWN = {"ipython"}
# A format of fsspec, named by its protocol and never imported.
BEHIND_A_PROTOCOL = {"s3fs", "gcsfs", "adlfs"}


def name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return match[0].lower().replace("_", "-")


def imported_packages() -> set[str]:
    """Top-level names that the sources import, at the top of a file or later."""
    names: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.partition(".")[0])
    return names - {"trietune"} - set(sys.stdlib_module_names)


def imported_distributions() -> set[str]:
    providers = metadata.packages_distributions()
    found = set()
    for name in imported_packages():
        candidates = {provider.lower().replace("_", "-") for provider in providers.get(name, [name])}
        # Several distributions may share a top-level name, as the plug-ins of a namespace do: the declared one counts.
        found.add(next(iter(sorted(candidates & declared())), min(candidates)))
    return found


def declared() -> set[str]:
    optional = {name_of(item) for extra in PROJECT["optional-dependencies"].values() for item in extra}
    return {name_of(item) for item in PROJECT["dependencies"]} | optional


def test_what_is_imported_is_declared() -> None:
    assert imported_distributions() - declared() - INSTALLED_WITH_THE_DEVICE - THE_NOTEBOOKS_OWN == set()


def test_what_is_declared_is_imported() -> None:
    assert declared() - imported_distributions() - BEHIND_A_PROTOCOL == set()


def test_each_dependency_has_a_lower_bound() -> None:
    assert [item for item in PROJECT["dependencies"] if ">=" not in item] == []
