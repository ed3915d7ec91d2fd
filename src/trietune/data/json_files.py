"""Rows of JSON files: one object per line, a list of objects, a list under a key, or SQuAD's nested form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trietune.data.json_text import JsonDecoder, RepeatedKeyError, RepeatedKeys
from trietune.data.opening import BrokenRow, FileOptions, NumberedRow, read_lines, read_text
from trietune.errors import UserError


def read_jsonl(path: Path, options: FileOptions) -> Iterator[NumberedRow]:
    decode = JsonDecoder().decode
    for number, line in read_lines(path, options):
        if isinstance(line, BrokenRow):
            yield number, line
            continue
        try:
            row = decode(line)
        except (ValueError, RecursionError) as error:
            yield number, BrokenRow(_json_error(error))
            continue
        yield number, row if isinstance(row, dict) else BrokenRow("a JSON value that is not an object {...}")


def read_json_list(path: Path, options: FileOptions) -> Iterator[NumberedRow]:
    """Items are decoded one after the other, so that each is known by its line."""
    text = read_text(path, options)
    decoder = JsonDecoder()
    position, number = _skip_space(text, 0), 1
    if not text.startswith("[", position):
        raise UserError(
            f"`{path.name}` is not a JSON list of objects",
            where=f"{path}, line 1",
            next_step='write `[{"prompt": "...", "completion": "..."}, ...]`, or one object per line as .jsonl',
        )
    number += text.count("\n", 0, position)
    seen = position
    position = _skip_space(text, position + 1)
    while not text.startswith("]", position):
        number += text.count("\n", seen, position)
        seen = position
        try:
            row, repeated, position = decoder.decode_at(text, position)
        except (ValueError, RecursionError) as error:
            # What follows a syntax error has no place that could be trusted.
            yield number, BrokenRow(_json_error(error))
            return
        if repeated is not None:
            yield number, BrokenRow(_duplicate(repeated))
        else:
            yield number, row if isinstance(row, dict) else BrokenRow("a JSON value that is not an object {...}")
        position = _skip_space(text, position)
        if text.startswith(",", position):
            position = _skip_space(text, position + 1)
        elif not text.startswith("]", position):
            yield number, BrokenRow("the list does not continue with `,` or end with `]` after this item")
            return
    end = position + 1
    beyond = _skip_space(text, end)
    if beyond < len(text):
        number += text.count("\n", seen, beyond)
        yield number, BrokenRow(f"the list has ended, and {len(text[beyond:].rstrip()):,} more characters follow")


def read_wrapped(path: Path, options: FileOptions) -> Iterator[NumberedRow]:
    """The objects of the one list in an object, such as {"data": [{...}, {...}]}, counted from 1."""
    try:
        document = JsonDecoder().decode_marked(read_text(path, options))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"`{path.name}` is {_json_error(error)}", where=str(path), next_step="copy or download the file again"
        ) from None
    items = find_list(document)
    if items is None:
        raise UserError(
            f"`{path.name}` is one JSON object, without one list of rows in it",
            where=f"{path}; its keys are {', '.join(f'`{key}`' for key in list(document)[:8])}",
            next_step='write `{"data": [{...}, ...]}`, a list, or one object per line as .jsonl',
        )
    for number, row in enumerate(items, start=1):
        if isinstance(row, RepeatedKeys):
            yield number, BrokenRow(_duplicate(row.repeated))
        else:
            yield number, row if isinstance(row, dict) else BrokenRow("a JSON value that is not an object {...}")


def find_list(document: Any) -> list[object] | None:
    """The only value of an object that is a list of objects."""
    lists = [one for one in document.values() if isinstance(one, list) and one and isinstance(one[0], dict)]
    return lists[0] if len(lists) == 1 else None


def read_squad(path: Path, options: FileOptions) -> Iterator[NumberedRow]:
    """One row per question, counted from 1, in the hub's columns: line numbers mean nothing inside one JSON value."""
    number = 0
    try:
        document = JsonDecoder().decode_marked(read_text(path, options))
        _check_squad_object(document, "the file", path)
        for place, article in enumerate(document["data"], start=1):
            _check_squad_object(article, f"article {place}", path)
            for paragraph in article["paragraphs"]:
                _check_squad_object(paragraph, f"a paragraph of article {place}", path)
                context = paragraph["context"]
                for qa in paragraph["qas"]:
                    number += 1
                    if (repeated := _repeated_in_question(qa)) is not None:
                        yield number, BrokenRow(_duplicate(repeated))
                        continue
                    if (unclear := _unclear(qa)) is not None:
                        yield number, BrokenRow(unclear)
                        continue
                    answers = [] if qa.get("is_impossible") else [answer["text"] for answer in qa["answers"]]
                    row = {"context": context, "question": qa["question"], "answers": {"text": answers}}
                    yield number, row if qa.get("id") is None else {"id": str(qa["id"]), **row}
    except json.JSONDecodeError as error:
        raise UserError(
            f"`{path.name}` is not JSON: {error.msg}",
            where=f"{path}, line {error.lineno}, column {error.colno}",
            next_step="the file may be cut off; copy or download it again",
        ) from None
    except RecursionError:
        raise UserError(
            f"`{path.name}` is nested too deeply", where=str(path), next_step="take lists or objects out of each other"
        ) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"`{path.name}` is not in SQuAD's form: {_missing(error)}",
            where=str(path),
            next_step='SQuAD files read {"data": [{"paragraphs": [{"context": ..., "qas": [{"question": ..., '
            '"answers": [{"text": ...}]}]}]}]}',
        ) from None


def _check_squad_object(value: object, name: str, path: Path) -> None:
    if isinstance(value, RepeatedKeys):
        raise UserError(
            f"{name} has the key `{value.repeated}` twice, so it is not clear which is meant",
            where=str(path),
            next_step="remove one of the two",
        )


def _repeated_in_question(qa: object) -> str | None:
    """A key that stands twice in a question or in one of its answers."""
    answers = qa.get("answers") if isinstance(qa, dict) else None
    parts = [qa, *(answers if isinstance(answers, list) else ())]
    return next((part.repeated for part in parts if isinstance(part, RepeatedKeys)), None)


def _unclear(qa: Any) -> str | None:
    """Why it is not clear whether a question has an answer; None if it is. A text such as "false" would be true."""
    is_impossible = qa.get("is_impossible")
    if is_impossible in (None, True, False):
        return None
    return f"`is_impossible` is `{str(is_impossible)[:80]}`, neither true nor false"


def _duplicate(key: str) -> str:
    return str(RepeatedKeyError(key))


def _json_error(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "JSON that is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}, column {error.colno}"
    return str(error) if isinstance(error, RepeatedKeyError) else "not JSON"


def _missing(error: Exception) -> str:
    return (
        f"no {error} where one belongs"
        if isinstance(error, KeyError)
        else "a value of another kind where a list belongs"
    )


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
