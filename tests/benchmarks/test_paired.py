"""The study of two values of one key."""

from __future__ import annotations

import pytest
from paired import read_value

from trietune import load_config


@pytest.mark.parametrize(
    ("key", "text", "value"), [("add_bos", "false", False), ("objective", "rank", "rank"), ("lora_r", "4", 4)]
)
def test_a_value_is_what_a_file_would_hold(key: str, text: str, value: object) -> None:
    assert getattr(load_config(None, {key: read_value(text)}, {}), key) == value
