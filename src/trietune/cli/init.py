"""`trietune init` and `trietune doctor`: what stands before the first run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from trietune.cli.options import AsJson, MaybePath, MaybeText, Overrides
from trietune.cli.printing import console, print_json, say, say_line
from trietune.errors import UserError
from trietune.io.outputs import check_output, write_output


def init(
    kind: Annotated[
        str, typer.Argument(metavar="KIND|DATA", help="sst2, squad, chat or jsonl; or a file or folder of data.")
    ] = "sst2",
    out: Annotated[
        MaybePath, typer.Option(help="File to write; default: KIND.yaml here, or the name of the data.")
    ] = None,
) -> None:
    """Write a commented configuration file, and the schema by which an editor checks it."""
    from trietune.config.schema import json_schema
    from trietune.config.template import SCHEMA_FILE, render_for_data, render_template, template_kinds
    from trietune.data.look import default_name, look_at

    name: str = kind
    known = next((one for one in template_kinds() if one == kind), None)
    if known is not None:
        text = render_template(known)
    elif Path(kind).expanduser().exists() or Path(kind.rpartition(":")[0] or "?").expanduser().is_dir():
        heading, values = look_at(kind, say)
        name = default_name(kind)
        text = render_for_data(heading, {"wandb_run_name": name, **values})
    else:
        raise UserError(
            f"there is no template and no file `{kind}`",
            next_step=f"trietune init {'|'.join(template_kinds())}     (or a file or folder of your data)",
        )
    target = out or Path(f"{name}.yaml")
    if os.path.lexists(target):
        raise UserError(f"`{target}` exists already", next_step=f"trietune init {kind} --out ANOTHER.yaml")
    schema = target.parent / SCHEMA_FILE
    check_output(schema, "init")
    write_output(target, text.encode(), "--out")
    write_output(schema, (json.dumps(json_schema(), indent=1) + "\n").encode(), "init")
    say_line(f"{target}: each key is explained beside it")
    say_line(f"next:  trietune train {target} --dry-run")


def doctor(
    model: Annotated[
        MaybeText, typer.Argument(metavar="[MODEL]", help="A folder, a hub id or a GGUF file: how would it train?")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Say what is here, what would be used and why, and what is missing; of MODEL, how it would train."""
    if model is None:
        if overrides:
            raise UserError("`--set` is about a model, and none is named", next_step="trietune doctor MODEL --set ...")
        from trietune.device.doctor import examine

        found = examine()
    else:
        from trietune.run.model_doctor import examine_model

        with console() as tracker:
            found = examine_model(model, overrides, report=tracker.info)
    if as_json:
        print_json(found.as_json())
        return
    for line in found.lines():
        say_line(line)
