"""Numbers read the same everywhere."""

from __future__ import annotations

import pytest

from trietune.tracking import wording


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.39112, "0.3911"), (2.1034, "2.103"), (12.3456, "12.35"), (1234.5, "1,234"), (6e-5, "6e-05")],
)
def test_numbers_have_four_significant_digits(value: float, text: str) -> None:
    assert wording.number(value) == text


def test_shares_are_in_percent_and_losses_are_not() -> None:
    assert wording.metric_value("eval/accuracy", 0.875) == "87.5%"
    assert wording.metric_value("eval/f1_answerable", 0.5) == "50.0%"
    assert wording.metric_value("eval/exact_match", 1.0) == "100.0%"
    assert wording.metric_value("eval/loss", 0.875) == "0.8750"
    assert wording.metric_value("eval/loss", None) == "-"
    assert wording.metric_value("eval/loss", float("nan")) == "not finite"
    assert wording.interval("eval/accuracy", 0.851, 0.896) == "85.1 to 89.6"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (725, "12:05"), (3723, "1:02:03")])
def test_durations(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(12, "12 bytes"), (482.6e3, "483 kB"), (1.31e9, "1.3 GB"), (2e12, "2.0 TB")]
)
def test_sizes(num_bytes: float, text: str) -> None:
    assert wording.size(num_bytes) == text


def test_text_of_data_cannot_steer_a_terminal() -> None:
    assert wording.visible("a\x1b[31m\rb\u202ec\n") == "a\\x1b[31m\\rb\\u202ec\n"
    assert wording.visible("naïve 👩\u200d🚀 日本") == "naïve 👩\u200d🚀 日本"


def test_what_is_cut_is_marked() -> None:
    assert wording.one_line("a  b\nc", 10) == "a b c"
    assert wording.one_line("abcdefgh", 5) == "abcd…"
