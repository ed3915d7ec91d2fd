"""`trietune predict`: answers to texts, to a file of them, or in a conversation."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from trietune.cli.options import AsJson, MaybeNumber, MaybePath, MaybeText, Overrides, Target
from trietune.cli.printing import console, print_json, print_json_line, say
from trietune.errors import UserError
from trietune.io.json_types import JsonMapping
from trietune.io.outputs import check_output, write_output
from trietune.run.signals import StopSignals


def predict(
    target: Target,
    texts: Annotated[list[str], typer.Argument(help="What to ask; several are asked one by one.")] = [],  # noqa: B006
    text: Annotated[list[str], typer.Option(help="The same as an option; may be repeated.")] = [],  # noqa: B006
    input_file: Annotated[
        MaybePath, typer.Option("--input", help="A file in any form that training reads; `-` is stdin.")
    ] = None,
    output_file: Annotated[MaybePath, typer.Option("--output", help="JSONL; `-` is stdout.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    system: Annotated[
        MaybeText, typer.Option("--system", help="System prompt of conversations, in place of the training data's.")
    ] = None,
    temperature: Annotated[
        MaybeNumber, typer.Option("--temperature", help="Draw tokens; 0, the default, takes the likeliest.")
    ] = None,
    top_p: Annotated[
        MaybeNumber, typer.Option("--top-p", help="Draw from the likeliest tokens that make up this share.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Ask a model: a text, a file, a pipe; at a terminal without text, a conversation."""
    from trietune.cli.chat import Chat
    from trietune.run.opened import open_model
    from trietune.run.opened import predict as ask

    text = [*_texts_to_ask(texts), *text]
    if output_file is not None and str(output_file) == "-":
        output_file, writes_lines = None, True
    else:
        writes_lines = False
    if output_file is not None:
        check_output(output_file, "--output")
    is_chat = not text and input_file is None and sys.stdin.isatty()
    placed = [(f"input {number}", one) for number, one in enumerate(text, start=1)]
    placed += [] if is_chat else _read_inputs(input_file, target, overrides, has_text=bool(text))
    places, inputs = [place for place, _ in placed], [given for _, given in placed]
    with console() as tracker:
        opened = open_model(target, overrides, tracker)
        if system is not None:
            opened = opened.with_system_prompt(system)
    # Not before a device has been chosen: it loads torch.
    from trietune.evaluation.sampling import make_sampling

    sampling = make_sampling(temperature, top_p)
    if is_chat:
        Chat(opened, max_new_tokens, temperature, top_p, answer_line=_answer_line).run()
        return
    with StopSignals() as signals:
        answers = ask(
            opened, inputs, max_new_tokens=max_new_tokens, check_stop=signals.check, sampling=sampling, places=places
        )
    records = [{"input": given, **answer} for given, answer in zip(inputs, answers, strict=True)]
    if output_file is not None:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_output(output_file, lines.encode("utf-8", "backslashreplace"), "--output")
        say(f"{len(records):,} answers in {output_file}", err=True)
    elif writes_lines:
        for record in records:
            print_json_line(record)
    elif as_json:
        print_json({"target": target, "predictions": records})
    else:
        for record in records:
            say(_answer_line(record))


def _texts_to_ask(words: Sequence[str]) -> Sequence[str]:
    for word in words:
        is_short = len(word) < 200 and "\n" not in word
        if is_short and Path(word).is_file():
            raise UserError(
                f"`{word}` is a file",
                next_step=f"`--input {word}` asks what it holds; `--text {word}` asks these words",
            )
    return words


def _read_inputs(
    path: Path | None, target: str, overrides: Sequence[str], *, has_text: bool
) -> Iterator[tuple[str, Any]]:
    """Inputs with their places; a file is read as the run reads its own, unless `overrides` say otherwise."""
    from trietune.config import load_config
    from trietune.data.inputs import read_inputs, read_pipe
    from trietune.data.sources import file_options
    from trietune.io.places import expand

    if path is not None and str(path) != "-":
        keys = ("file_encoding", "csv_separator", "txt_unit")
        own = [one for one in overrides if one.partition("=")[0].strip() in keys]
        config = expand(target) / "config.yaml"
        yield from read_inputs(path, file_options(load_config(config if config.is_file() else None, own)))
    elif path is not None or not (has_text or sys.stdin.isatty()):
        yield from read_pipe(sys.stdin.read())


def _answer_line(record: JsonMapping) -> str:
    from trietune.tracking import wording

    if "label" not in record:
        return str(record["text"])
    others = "  ".join(f"{name} {share:.1%}" for name, share in record["probabilities"].items())
    return f"{wording.line(str(record['label']))}\t{wording.line(others)}"
