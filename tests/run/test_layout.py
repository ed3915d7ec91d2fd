"""How the package is laid out: objects are whole when they are made, files form no circle, devices come first."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import trietune

PACKAGE = Path(trietune.__file__).parent
TREES = {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
CLASSES = {node.name: node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
MAKERS = ("__init__", "__post_init__", "__new__")


def own_names(node: ast.AST) -> Iterator[str]:
    """Attributes of `self` that are assigned within `node`."""
    for inner in ast.walk(node):
        if not (isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store)):
            continue
        if isinstance(inner.value, ast.Name) and inner.value.id == "self":
            yield inner.attr


def born_with(node: ast.ClassDef) -> set[str]:
    """Attributes that an object of this class, or of a base in the package, has when it is made."""
    names: set[str] = set()
    for inner in node.body:
        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
            names.add(inner.target.id)
        elif isinstance(inner, ast.Assign):
            names.update(target.id for target in inner.targets if isinstance(target, ast.Name))
        elif isinstance(inner, ast.FunctionDef):
            if inner.name in MAKERS:
                names.update(own_names(inner))
            if any(isinstance(mark, ast.Attribute) and mark.attr == "setter" for mark in inner.decorator_list):
                names.add(inner.name)
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in CLASSES:
            names |= born_with(CLASSES[base.id])
    return names


def born_late(tree: ast.AST) -> list[str]:
    return [
        f"{node.name}.{name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name not in MAKERS
        for name in own_names(method)
        if name not in born_with(node)
    ]


def test_no_attribute_is_born_outside_init() -> None:
    late = {str(path.relative_to(PACKAGE)): found for path, tree in TREES.items() if (found := born_late(tree))}
    assert late == {}


def test_an_attribute_born_outside_init_would_be_found() -> None:
    code = "class A:\n    def __init__(self): self.a = 1\n    def go(self): self.a = 2; self.b = 3"
    assert born_late(ast.parse(code)) == ["A.b"]


def imported_files(path: Path) -> set[Path]:
    """Files of the package that `path` imports, for types too; packages' own `__init__` aside."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trietune"):
            folder = PACKAGE.parent.joinpath(*str(node.module).split("."))
            found.update(folder / f"{alias.name}.py" for alias in node.names)
            found.add(folder.with_suffix(".py"))
    return {file for file in found if file in TREES and file != path}


def test_files_import_each_other_in_no_circle() -> None:
    arrows = {path: imported_files(path) for path in TREES if path.name != "__init__.py"}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(str(path.relative_to(PACKAGE)) for path in error.args[1]))


def test_no_file_but_three_stands_beside_the_folders() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "errors.py"}


def test_transformers_is_not_there_before_a_device_is_chosen() -> None:
    """Its import starts XLA devices, which must be told first what they are to do."""
    code = (
        "import sys, trietune.run.train, trietune.run.opened, trietune.run.prepare\n"
        "early = {'transformers', 'peft'} & set(sys.modules)\nassert not early, early\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
