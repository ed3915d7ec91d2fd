"""The one table of metrics: directions, units and the hub's names, for whole and for partial metrics."""

from __future__ import annotations

import pytest

from trietune.io.metric_names import UNKNOWN, hub_name, kind_of


@pytest.mark.parametrize(
    ("name", "better", "is_share"),
    [
        ("eval/loss", "min", False),
        ("eval/perplexity", "min", False),
        ("eval/accuracy", "max", True),
        ("eval/no_answer_f1", "max", True),
        ("eval/f1_answerable", "max", True),
        ("eval/has_answer_exact_match", "max", True),
        ("eval/rewards/accuracies", "max", True),
        ("eval/rewards/margins", "max", False),
        ("ranks/waiting_share", None, True),
        ("train/grad_norm", None, False),
    ],
)
def test_a_metric_is_known_by_the_last_part_of_its_name(name: str, better: str | None, is_share: bool) -> None:
    assert kind_of(name).better == better
    assert kind_of(name).is_share == is_share


def test_a_metric_that_is_not_in_the_table_is_a_plain_number() -> None:
    assert kind_of("eval/bleu") is UNKNOWN
    assert hub_name("eval/bleu") is None


def test_only_figures_of_the_whole_evaluation_have_a_name_on_the_hub() -> None:
    assert hub_name("eval/f1") == "f1"
    assert hub_name("eval/no_answer_f1") is None
    assert hub_name("train/accuracy") is None
