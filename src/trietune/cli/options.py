"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from trietune.cli.keys import complete_set

# typer reads these annotations at run time, so they are written as it understands them on every Python.
MaybePath = Optional[Path]  # noqa: UP045
MaybeNumber = Optional[float]  # noqa: UP045
MaybeText = Optional[str]  # noqa: UP045
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated.", autocompletion=complete_set),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Target = Annotated[str, typer.Argument(help="A run's folder, an adapter's folder, or a base model.")]
RunFolder = Annotated[Path, typer.Argument(help="A run's folder.")]
