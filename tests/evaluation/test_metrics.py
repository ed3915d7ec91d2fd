"""Metrics against values worked out by hand, against scipy, and against the official definitions written twice."""

from __future__ import annotations

import collections
import math
import re
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from trietune.evaluation import metrics

# Sums of the same fractions in another order.
ROUNDING = 1e-14


# --- SQuAD v2: golden values, by hand ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Norse", "norse"),
        ("  a   cat,\n and AN owl ", "cat and owl"),
        ("10th- and 11th-century", "10th and 11thcentury"),  # punctuation goes without a space in its place
        ("the-end", "theend"),  # so an article at a hyphen is no word of its own any more
        ("U.S.A.", "usa"),
        ("The", ""),
        ("«quoted» \u2013 dashed", "«quoted» \u2013 dashed"),  # string.punctuation is ASCII: these stay
        ("A.", ""),
        ("theatre another", "theatre another"),
        ("tea\u00a0time", "tea time"),  # str.split knows this space
        ("", ""),
    ],
)
def test_normalization_follows_the_official_order(text: str, normalized: str) -> None:
    assert metrics.normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "gold", "exact_match", "f1"),
    [
        ("The Normans", ["Normans"], 1.0, 1.0),
        ("in France", ["France"], 0.0, 2 / 3),  # precision 1/2, recall 1
        ("10th century", ["10th and 11th centuries", "the 10th century", "11th"], 1.0, 1.0),  # the best of several
        ("big big dog", ["big dog dog"], 0.0, 2 / 3),  # multiset: one big, one dog
        ("France", [], 0.0, 0.0),  # anything said to an unanswerable question is wrong
        ("", [], 1.0, 1.0),
        ("", ["France"], 0.0, 0.0),
        ("the", ["France"], 0.0, 0.0),  # normalizes to nothing
        ("the", [], 1.0, 1.0),
        ("a", ["the", "..."], 1.0, 1.0),  # gold answers that normalize to nothing do not count
        ("France", ["the", "France"], 1.0, 1.0),
    ],
)
def test_exact_match_and_f1_of_one_question(prediction: str, gold: list[str], exact_match: float, f1: float) -> None:
    assert metrics.exact_match(prediction, gold) == exact_match
    assert metrics.f1_score(prediction, gold) == pytest.approx(f1, rel=ROUNDING)


def test_answers_are_measured_apart_for_answerable_and_unanswerable_questions() -> None:
    predictions = ["in France", "Unanswerable.", "unanswerable", "Rollo", "The Normans"]
    gold = [["France"], [], ["1066"], [], ["Normans", "Norse"]]
    measured = metrics.measure_answers(predictions, gold)
    assert measured.metrics == {
        "exact_match": pytest.approx(2 / 5),
        "f1": pytest.approx((2 / 3 + 1 + 0 + 0 + 1) / 5),
        "has_answer_exact_match": pytest.approx(1 / 3),
        "has_answer_f1": pytest.approx((2 / 3 + 0 + 1) / 3),
        "no_answer_exact_match": pytest.approx(1 / 2),
        "no_answer_f1": pytest.approx(1 / 2),
    }
    assert measured.intervals.keys() == measured.metrics.keys()


def test_a_set_without_unanswerable_questions_has_no_numbers_for_them() -> None:
    measured = metrics.measure_answers(["x"], [["x"]])
    assert sorted(measured.metrics) == ["exact_match", "f1", "has_answer_exact_match", "has_answer_f1"]


# --- SQuAD v2: the published definitions, written a second time -------------------------------------------------------


def _published_normalize(text: str) -> str:
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _published_scores(prediction: str, gold_answers: list[str]) -> tuple[int, float]:
    gold_answers = [gold for gold in gold_answers if _published_normalize(gold)] or [""]
    exact = max(int(_published_normalize(gold) == _published_normalize(prediction)) for gold in gold_answers)
    return exact, max(_published_f1(gold, prediction) for gold in gold_answers)


def _published_f1(gold: str, prediction: str) -> float:
    gold_tokens = _published_normalize(gold).split() if gold else []
    predicted_tokens = _published_normalize(prediction).split() if prediction else []
    same = sum((collections.Counter(gold_tokens) & collections.Counter(predicted_tokens)).values())
    if len(gold_tokens) == 0 or len(predicted_tokens) == 0:
        return int(gold_tokens == predicted_tokens)
    if same == 0:
        return 0
    precision, recall = 1.0 * same / len(predicted_tokens), 1.0 * same / len(gold_tokens)
    return (2 * precision * recall) / (precision + recall)


WORDS = st.sampled_from(["the", "The", "a", "An", "norse", "Norse,", "in", "1066", "U.S.", "--", "é", "\u00a0", "ﬁn"])
TEXTS = st.lists(WORDS, max_size=6).map(" ".join) | st.text(max_size=12)


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.tuples(TEXTS, st.lists(TEXTS, max_size=3)), min_size=1, max_size=8))
def test_scores_equal_the_published_definitions(questions: list[tuple[str, list[str]]]) -> None:
    predictions = ["" if metrics.normalize_answer(said) == "unanswerable" else said for said, _ in questions]
    expected = [
        _published_scores(prediction, gold) for prediction, (_, gold) in zip(predictions, questions, strict=True)
    ]
    measured = metrics.measure_answers([said for said, _ in questions], [gold for _, gold in questions])
    percent = 100.0 / len(questions)
    assert measured.metrics["exact_match"] * 100 == pytest.approx(percent * sum(e for e, _ in expected), rel=ROUNDING)
    assert measured.metrics["f1"] * 100 == pytest.approx(percent * sum(f for _, f in expected), rel=ROUNDING)


# --- accuracy and intervals -------------------------------------------------------------------------------------------


def test_accuracy_is_the_share_that_is_right_with_its_interval() -> None:
    measured = metrics.measure_accuracy([True] * 763 + [False] * 109)
    assert measured.metrics == {"accuracy": 763 / 872}
    assert measured.intervals["accuracy"] == pytest.approx((0.8514, 0.8953), abs=5e-5)


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(1, 3000), st.floats(0, 1))
def test_wilson_interval_equals_scipys(num_examples: int, share: float) -> None:
    num_right = round(share * num_examples)
    expected = binomtest(num_right, num_examples).proportion_ci(method="wilson")
    assert metrics.wilson_interval(num_right, num_examples) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("num_right", "num_examples"), [(0, 1), (1, 1), (0, 872), (872, 872)])
def test_wilson_interval_stays_inside_zero_and_one_and_is_not_empty(num_right: int, num_examples: int) -> None:
    low, high = metrics.wilson_interval(num_right, num_examples)
    assert 0 <= low < high <= 1
    assert low <= num_right / num_examples <= high


def test_bootstrap_interval_agrees_with_the_normal_one_on_many_scores() -> None:
    scores = np.random.default_rng(5).choice([0.0, 0.25, 0.4, 2 / 3, 1.0], size=2000, p=[0.3, 0.2, 0.1, 0.1, 0.3])
    half = metrics.Z_95 * scores.std() / math.sqrt(len(scores))
    # Ten thousand resamples give each end to about 3% of the half width.
    expected = (scores.mean() - half, scores.mean() + half)
    assert metrics.mean_interval(scores, seed=1) == pytest.approx(expected, abs=half / 10)
    assert metrics.mean_interval(scores, seed=1) == metrics.mean_interval(scores, seed=1)


def test_mean_interval_of_zeros_and_ones_is_wilsons() -> None:
    assert metrics.mean_interval(np.array([0.0, 1.0, 1.0]), seed=0) == metrics.wilson_interval(2, 3)
    assert metrics.mean_interval(np.zeros(50), seed=0)[1] > 0.05


# --- loss and perplexity ----------------------------------------------------------------------------------------------


def test_loss_is_weighted_by_tokens_and_not_by_examples() -> None:
    measured = metrics.measure_loss([2.0, 0.5, 0.0], [8, 1, 0])
    assert measured.metrics["loss"] == pytest.approx(2.5 / 9)
    assert measured.metrics["perplexity"] == pytest.approx(math.exp(2.5 / 9))


def test_loss_interval_covers_the_true_loss_about_95_times_in_100() -> None:
    generator = np.random.default_rng(3)
    covered, num_trials = 0, 400
    for _ in range(num_trials):
        weights = generator.integers(1, 8, size=120)
        losses = np.array([generator.exponential(1.5, size=weight).sum() for weight in weights])
        low, high = metrics.measure_loss(losses, weights).intervals["loss"]
        covered += low <= 1.5 <= high
    # Four standard errors of a share of 0.95 in 400 trials.
    assert covered / num_trials == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / num_trials))


def test_a_loss_without_label_tokens_is_not_a_number_but_absent() -> None:
    assert metrics.measure_loss([0.0], [0]) == metrics.Measured()
    assert metrics.measure_accuracy([]) == metrics.Measured()
    assert metrics.measure_answers([], []) == metrics.Measured()


@pytest.mark.parametrize(("loss", "perplexity"), [(math.inf, math.inf), (1e6, math.inf), (math.nan, math.nan)])
def test_a_broken_model_is_reported_and_does_not_end_the_evaluation(loss: float, perplexity: float) -> None:
    measured = metrics.measure_loss([loss, loss], [1, 1])
    assert measured.metrics == {
        "loss": pytest.approx(loss, nan_ok=True),
        "perplexity": pytest.approx(perplexity, nan_ok=True),
    }


def test_joined_measurements_carry_the_prefix() -> None:
    joined = metrics.join([metrics.measure_loss([1.0, 2.0], [1, 1]), metrics.measure_accuracy([True])], prefix="eval/")
    assert list(joined.metrics) == ["eval/loss", "eval/perplexity", "eval/accuracy"]
    assert joined.intervals["eval/accuracy"] == metrics.wilson_interval(1, 1)


# --- ROUGE-L ----------------------------------------------------------------------------------------------------------

LONG = "one two three four five six seven eight nine ten"


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    # Five words of the ten in order, nothing else: precision 1, recall 1/2.
    gold = [[LONG], [LONG.upper() + " eleven twelve", LONG]]
    measured = metrics.measure_overlap(["one three five seven nine", LONG], gold)
    assert measured.metrics["rouge_l"] == pytest.approx((2 / 3 + 1) / 2)
    low, high = measured.intervals["rouge_l"]
    assert 0 <= low <= measured.metrics["rouge_l"] <= high <= 1


@pytest.mark.parametrize("gold", [[["four words of gold"]], [[]], []])
def test_short_answers_and_no_answers_have_no_rouge_l(gold: list[list[str]]) -> None:
    assert metrics.measure_overlap(["x"] * len(gold), gold) == metrics.Measured()
