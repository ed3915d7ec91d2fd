"""Braces in a user's templates that are no columns: refused where a part of one is meant, said where they stay text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trietune.config import load_config
from trietune.data.load import load_data
from trietune.errors import UserError

ROWS = [{"q": "what", "a": "that", "c.d": "x"}, {"q": "why", "a": "so", "c.d": "y"}]


def lines_of(prompt: str, completion: str, tokenizer: Any, make_settings: Any, folder: Path) -> list[str]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 10))
    said: list[str] = []
    data = load_data(
        make_settings(train_file=str(path), prompt_template=prompt, completion_template=completion),
        tokenizer,
        cache_folder=folder / "cache",
        report=said.append,
        progress=lambda phase, done, total: None,
        check_stop=lambda: None,
    )
    assert data.counts.train.kept == 19
    return [line for line in said if "template`:" in line]


@pytest.mark.parametrize("part", ["q[0]", "q.text", "q[0].text", "a[key]", "c.d.e", "q.x!r", "q[0]:>4"])
def test_a_part_of_a_column_is_refused(part: str, tokenizer: Any, make_settings: Any, tmp_path: Path) -> None:
    column = "c.d" if part.startswith("c") else part[0]
    for templates in ((f"{{{part}}} {{q}}", "{a}"), ("{q}", f"{{a}} {{{part}}}")):
        with pytest.raises(UserError, match="asks for a part of the column") as refused:
            lines_of(*templates, tokenizer, make_settings, tmp_path)
        assert f"a part of the column `{column}`: `{{{part}}}`" in str(refused.value)
        assert f"write `{{{column}}}`" in str(refused.value)


def test_what_stays_text_is_said(tokenizer: Any, make_settings: Any, tmp_path: Path) -> None:
    of = [tokenizer, make_settings, tmp_path]
    assert lines_of("{q (en)} {}: {c.d} {q}", "{a}", *of) == [
        "`prompt_template`: `{q (en)}`, `{}` stay text: they are not columns"
    ]
    assert lines_of("{q}", "{a} {x/y}", *of) == ["`completion_template`: `{x/y}` stays text: it is not a column"]
    assert lines_of('{"q": "{q}", "o": {"n": [1]}, "p": {}}', "{{a}} {a}", *of) == []


def test_an_optional_column_that_the_first_row_has_not_is_said(
    tokenizer: Any, make_settings: Any, tmp_path: Path
) -> None:
    of = [tokenizer, make_settings, tmp_path]
    absent = "the first row of `rows.jsonl` has no `context`, which is empty where a row has none"
    assert lines_of("{context?}{q?}", "{a}", *of) == [f"`prompt_template`: {absent}"]
    assert lines_of("{#context}C: {context}{/context}{q}", "{a}", *of) == [f"`prompt_template`: {absent}"]


def test_tokens_without_labels_are_told_what_to_add(tokenizer: Any, make_settings: Any, tmp_path: Path) -> None:
    path = tmp_path / "tokens.jsonl"
    path.write_text(json.dumps({"input_ids": [1, 2], "attention_mask": [1, 1]}) + "\n")
    with pytest.raises(UserError, match="give each row `labels`, a list as long as its `input_ids`"):
        load_data(
            make_settings(train_file=str(path)),
            tokenizer,
            cache_folder=tmp_path / "cache",
            report=lambda line: None,
            progress=lambda phase, done, total: None,
            check_stop=lambda: None,
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt_template", "{q}\ud83d"),
        ("chat_template", "\ud83d{{ messages }}"),
        ("chat_system_prompt", "be \udc00"),
        ("train_file", ["a.jsonl", "b\udcff.jsonl"]),
        ("wandb_run_name", "\udcff"),
    ],
)
def test_a_setting_that_no_file_can_hold_is_named(key: str, value: Any) -> None:
    half = "\\ud83d" if "\ud83d" in value else "\\udc00" if key == "chat_system_prompt" else "\\udcff"
    with pytest.raises(UserError) as refused:
        load_config(overrides={key: value}, environ={})
    assert f"`{key}` (argument) holds half a character, or a byte that is not UTF-8 ({half})" in str(refused.value)
