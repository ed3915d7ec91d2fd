"""Commands as Python calls: what to do next, for somebody who called from Python.

trietune predict runs/x                 ->  trietune.predict("runs/x", ["a text"])
`--set batching=padded`                 ->  "batching=padded" among the overrides
`--resume`                              ->  "resume_from_checkpoint=auto" among the overrides
"""

from __future__ import annotations

import re
import shlex

_OVERRIDE = re.compile(r"`?--set ([a-z_]+=[^\s`]+)`?")
_DATASET = re.compile(r"(?:the option )?`?--dataset ([^\s`]+)`?")
_KEY = re.compile(r"`--([a-z][a-z-]*) ([^\s`]+)`")
_COMMAND = re.compile(r"`?trietune (train|predict|evaluate|export|report) ([^`\s]+)([^`\n]*)`?")


def as_python(text: str) -> str:
    """`text` with commands and options in it as Python; what has no call of its own stays a command."""
    text = _COMMAND.sub(_as_call, text)
    text = _OVERRIDE.sub(r'`"\1"` among the overrides', text)
    text = _DATASET.sub(r'`overrides=["dataset_id=\1"]`', text)
    text = text.replace("`--resume`", '`"resume_from_checkpoint=auto"` among the overrides')
    return _KEY.sub(lambda found: f'`"{found[1].replace("-", "_")}={found[2]}"` among the overrides', text)


def _as_call(found: re.Match[str]) -> str:
    name, target, rest = found[1], found[2], found[3]
    ticks = "`" if found[0].startswith("`") else ""
    options, comment = _split(rest)
    overrides = _overrides(options)
    quoted = f'"{target}"'
    match name:
        case "train" if "--dry-run" in options:
            call = f"trietune.load_config({quoted})"
        case "train":
            call = f"trietune.train(trietune.load_config({quoted}{f', {overrides}' if overrides else ''}))"
        case "predict":
            call = f'trietune.predict({quoted}, ["a text"])'
        case "evaluate":
            call = f"trietune.evaluate({quoted}{f', overrides={overrides}' if overrides else ''})"
        case "export":
            out = next((word for word in options if not word.startswith("-")), "OUT")
            to = options[options.index("--to") + 1] if "--to" in options[:-1] else None
            more = (", merge=True" if "--merge" in options else "") + (f', to="{to}"' if to else "")
            call = f'trietune.export({quoted}, "{out}"{more})'
        case _:
            return found[0]
    return f"{ticks}{call}{ticks}{comment}"


def _split(rest: str) -> tuple[list[str], str]:
    """Options, and an explanation behind several blanks."""
    typed, gap, comment = re.split(r"(\s{3,}|$)", rest, maxsplit=1)
    try:
        return shlex.split(typed), gap + comment
    except ValueError:
        return typed.split(), gap + comment


def _overrides(options: list[str]) -> str:
    """A list of `key=value`, as Python writes it; empty without any."""
    found = []
    for index, word in enumerate(options):
        if word == "--resume":
            found.append("resume_from_checkpoint=auto")
        elif word == "--set" and index + 1 < len(options):
            found.append(options[index + 1])
        elif word == "--dataset" and index + 1 < len(options):
            found.append(f"dataset_id={options[index + 1]}")
    return "[" + ", ".join(f'"{one}"' for one in found) + "]" if found else ""
