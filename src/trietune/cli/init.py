"""`trietune init` and `trietune doctor`: what stands before the first run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from trietune.cli.options import AsJson, MaybePath
from trietune.cli.printing import print_json, say_line
from trietune.errors import UserError
from trietune.io.outputs import check_output, write_output


def init(
    kind: Annotated[str, typer.Argument(help="sst2, squad, chat or jsonl.")] = "sst2",
    out: Annotated[MaybePath, typer.Option(help="File to write; default: KIND.yaml here.")] = None,
) -> None:
    """Write a commented configuration file, and the schema by which an editor checks it."""
    from trietune.config.schema import json_schema
    from trietune.config.template import SCHEMA_FILE, render_template, template_kinds

    if kind not in template_kinds():
        raise UserError(f"there is no template `{kind}`", next_step=f"trietune init {'|'.join(template_kinds())}")
    target = out or Path(f"{kind}.yaml")
    if os.path.lexists(target):
        raise UserError(f"`{target}` exists already", next_step=f"trietune init {kind} --out ANOTHER.yaml")
    schema = target.parent / SCHEMA_FILE
    check_output(schema, "init")
    write_output(target, render_template(kind).encode(), "--out")
    write_output(schema, (json.dumps(json_schema(), indent=1) + "\n").encode(), "init")
    say_line(f"{target}: each key is explained beside it")
    say_line(f"next:  trietune train {target} --dry-run")


def doctor(as_json: AsJson = False) -> None:
    """Say what is here, what would be used and why, and what is missing."""
    from trietune.device.doctor import examine

    found = examine()
    if as_json:
        print_json(found.as_json())
        return
    for line in found.lines():
        say_line(line)
