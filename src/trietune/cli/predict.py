"""`trietune predict`: answers to texts, to a file of them, or in a conversation."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trietune.cli.options import AsJson, MaybePath, Overrides, Target
from trietune.cli.printing import console, print_json, print_json_line, say
from trietune.errors import UserError
from trietune.io.outputs import check_output, write_output
from trietune.run.signals import StopSignals

if TYPE_CHECKING:
    from trietune.run.opened import LoadedModel


def predict(
    target: Target,
    text: Annotated[list[str], typer.Option(help="A prompt; may be repeated.")] = [],  # noqa: B006
    input_file: Annotated[
        MaybePath, typer.Option("--input", help="Texts, one per line, or .jsonl with columns; `-` is stdin.")
    ] = None,
    output_file: Annotated[MaybePath, typer.Option("--output", help="JSONL; `-` is stdout.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Ask a model: a text, a file, a pipe; at a terminal without text, a conversation."""
    from trietune.run.opened import open_model
    from trietune.run.opened import predict as ask

    if output_file is not None and str(output_file) == "-":
        output_file, writes_lines = None, True
    else:
        writes_lines = False
    if output_file is not None:
        check_output(output_file, "--output")
    is_chat = not text and input_file is None and sys.stdin.isatty()
    inputs = [] if is_chat else [*text, *_read_inputs(input_file, has_text=bool(text))]
    with console() as tracker:
        opened = open_model(target, overrides, tracker)
    if is_chat:
        _chat(opened, max_new_tokens)
        return
    with StopSignals() as signals:
        answers = ask(opened, inputs, max_new_tokens=max_new_tokens, check_stop=signals.check)
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


def _read_inputs(path: Path | None, *, has_text: bool) -> Iterator[Any]:
    from trietune.data.json_text import JsonDecoder, RepeatedKeyError

    if path is None and (has_text or sys.stdin.isatty()):
        return
    is_stdin = path is None or str(path) == "-"
    try:
        text = sys.stdin.read() if is_stdin else path.read_text("utf-8-sig")  # type: ignore[union-attr]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`--input {path}` cannot be read: {error}", next_step="check the path") from error
    # Not `splitlines`: a text may hold the other separators that it knows.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    is_json = (path is not None and path.suffix.lower() in (".jsonl", ".ndjson")) or (
        is_stdin and bool(lines) and lines[0].startswith("{")
    )
    decoder = JsonDecoder()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield decoder.decode(line) if is_json else line
        except RepeatedKeyError as error:
            raise UserError(
                f"{path or 'stdin'}:{number} has a {error}", next_step="remove one of the two values"
            ) from error
        except (ValueError, RecursionError) as error:
            what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise UserError(f"{path or 'stdin'}:{number} is not JSON: {what}") from None


def _answer_line(record: dict[str, Any]) -> str:
    from trietune.tracking import wording

    if "label" not in record:
        return str(record["text"])
    others = "  ".join(f"{name} {share:.1%}" for name, share in record["probabilities"].items())
    return f"{wording.line(str(record['label']))}\t{wording.line(others)}"


def _chat(opened: LoadedModel, max_new_tokens: int) -> None:
    """Ask and answer until the end of input; adapters that were not trained on chats answer one text at a time."""
    from trietune.data.examples import Message
    from trietune.evaluation.predict import answer_turn, prompt_length
    from trietune.run.opened import predict as ask

    encoder = opened.encoder()
    is_chat = encoder.prompt_format.kind == "chat"
    say(f"{opened.name}: type a message; Ctrl-D quits" + ("; `/new` starts over" if is_chat else ""), err=True)
    messages: list[Message] = []
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            say("", err=True)
            return
        if not line:
            continue
        if line == "/new":
            messages = []
            continue
        try:
            if not is_chat:
                say(_answer_line(ask(opened, [line], max_new_tokens=max_new_tokens)[0]))
                continue
            messages = [*messages, Message("user", line)]
            turn = answer_turn(
                opened.model,
                encoder,
                messages,
                max_positions=opened.prove_for(prompt_length(encoder, messages) + max_new_tokens),
                max_new_tokens=max_new_tokens,
                on_text=lambda piece: say(piece, nl=False),
            )
            say("")
            messages = [*messages, turn]
        except UserError as error:
            say(str(error), err=True)
