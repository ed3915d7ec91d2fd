"""The YAML reader: values by the core schema of YAML 1.2, and everything else an error with its line."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trietune.config.yaml12 import Entry, YamlError, read_mapping, read_value, write_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-5", 6e-5),
        ("6E5", 6e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("yes", "yes"),
        ("no", "no"),
        ("TRUE", True),
        ("false", False),
        ("~", None),
        ("", None),
        ("2026-01-01", "2026-01-01"),
        ("1:30", "1:30"),
        ("'6'", "6"),
        ("[1, two, [3.0]]", [1, "two", [3.0]]),
        ("{a: 1, b: null}", {"a": 1, "b": None}),
        ("-.inf", -math.inf),
    ],
)
def test_scalar_is_read_by_the_core_schema(text: str, value: Any) -> None:
    assert read_value(text) == value
    assert type(read_value(text)) is type(value)


def test_lines_are_counted_from_one() -> None:
    document = read_mapping("# comment\n\na: 1\nb:\n  - 2\n  - 3\n'c': |\n  text\n")
    assert document.entries == (Entry("a", 1, 3), Entry("b", [2, 3], 4), Entry("c", "text\n", 7))
    assert document.errors == ()


def test_tags_anchors_aliases_and_nested_repeats_are_refused_with_their_line() -> None:
    errors = read_mapping("a: !!str 5\nb: &x 3\nc: *x\nd: {e: 1, e: 2}\nf: !python/object 3\n").errors
    assert [(error.what, error.line) for error in errors] == [
        ("tag `!!str`", 1),
        ("anchor `&x`", 2),
        ("alias `*x`", 3),
        ("repeated key `e`", 4),
        ("tag `!python/object`", 5),
    ]


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.just("\n")),
)


@given(st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=4), max_leaves=8))
def test_written_value_is_read_back(value: Any) -> None:
    assert read_value(write_value(value)) == value


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_and_never_a_crash(text: str) -> None:
    for read in (read_mapping, read_value):
        with suppress(YamlError):
            read(text)
