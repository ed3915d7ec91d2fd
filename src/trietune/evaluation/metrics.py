"""Numbers that say how good a model is, each with the interval that its number of examples allows.

    labels     accuracy                      872 sentences, 763 right: 0.8750, 95% interval 0.8514 to 0.8953
    answers    exact match and F1            SQuAD v2's own definitions, answerable and unanswerable apart
    any text   loss and perplexity           weighted by tokens: sum of all losses / number of all label tokens

All rates are fractions between 0 and 1; the official SQuAD script prints the same numbers times 100. Plain floats and
NumPy: nothing here knows a model.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trietune.data.templates import UNANSWERABLE
from trietune.errors import UserError

Z_95 = 1.959963984540054  # the normal distribution's 97.5% point
BOOTSTRAP_RESAMPLES = 10_000

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class Measured:
    """Metrics by name, and the 95% intervals of those that have one."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def measure_loss(losses: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray) -> Measured:
    """Loss and perplexity over all label tokens of all examples.

    Args:
        losses: float [B], summed over the label tokens of each example.
        weights: float [B], the number of label tokens of each example.

    The interval is that of a ratio of two means, by the delta method: examples, not tokens, are what was drawn.
    Without any label token there is nothing to measure, and the result is empty.
    """
    losses, weights = np.asarray(losses, np.float64), np.asarray(weights, np.float64)
    total_weight = weights.sum()
    if total_weight == 0:
        return Measured()
    loss = float(losses.sum() / total_weight)
    metrics = {"loss": loss, "perplexity": _exp(loss)}
    num_examples = int((weights > 0).sum())
    if num_examples < 2 or not math.isfinite(loss):
        return Measured(metrics)
    residuals = losses - loss * weights
    standard_error = math.sqrt(float(residuals @ residuals) * num_examples / (num_examples - 1)) / float(total_weight)
    low, high = loss - Z_95 * standard_error, loss + Z_95 * standard_error
    return Measured(metrics, {"loss": (low, high), "perplexity": (_exp(low), _exp(high))})


def measure_accuracy(is_right: Sequence[bool] | np.ndarray) -> Measured:
    """Share of right predictions, with its Wilson interval; empty for no examples."""
    num_right, num_examples = int(np.count_nonzero(is_right)), len(is_right)
    if num_examples == 0:
        return Measured()
    return Measured({"accuracy": num_right / num_examples}, {"accuracy": wilson_interval(num_right, num_examples)})


def measure_answers(predictions: Sequence[str], gold_answers: Sequence[Sequence[str]], *, seed: int = 0) -> Measured:
    """Exact match and F1 as the official SQuAD v2 script defines them, answerable and unanswerable questions apart.

    Args:
        predictions: what the model said; `unanswerable` is the empty prediction.
        gold_answers: all gold answers of each question; none for an unanswerable one.
        seed: seed of the bootstrap behind the intervals of F1.

    Names are `exact_match`, `f1`, and both again with `has_answer_` and `no_answer_`, where there are such questions.
    """
    texts = [prediction_text(prediction) for prediction in predictions]
    exact = np.array([exact_match(text, gold) for text, gold in zip(texts, gold_answers, strict=True)], np.float64)
    f1 = np.array([f1_score(text, gold) for text, gold in zip(texts, gold_answers, strict=True)], np.float64)
    has_answer = np.array([len(gold) > 0 for gold in gold_answers], bool)
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for prefix, chosen in (("", np.ones_like(has_answer)), ("has_answer_", has_answer), ("no_answer_", ~has_answer)):
        if chosen.any():
            for name, scores in (("exact_match", exact[chosen]), ("f1", f1[chosen])):
                metrics[prefix + name] = math.fsum(scores) / len(scores)
                intervals[prefix + name] = mean_interval(scores, seed=seed)
    return Measured(metrics, intervals)


# Answers of so many words on the average are long: a single other word makes them no exact match.
LONG_ANSWER_WORDS = 8


def measure_overlap(predictions: Sequence[str], gold_answers: Sequence[Sequence[str]], *, seed: int = 0) -> Measured:
    """ROUGE-L (F-measure of the longest common subsequence, without stemming) by `rouge-score`, if answers are long.

    The best over the gold answers of each example (Lin 2004). Empty where answers are short, or there are none.

    Raises:
        UserError: `rouge-score` is not installed.
    """
    answerable = [(said, gold) for said, gold in zip(predictions, gold_answers, strict=True) if gold]
    words = [len(one.split()) for _, gold in answerable for one in gold]
    if not words or sum(words) < LONG_ANSWER_WORDS * len(words):
        return Measured()
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError(
            "long answers are measured by ROUGE-L, and the package `rouge-score` is not installed",
            next_step="pip install rouge-score     (or task: text)",
        ) from None
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    scores = np.array([scorer.score_multi(list(gold), said)["rougeL"].fmeasure for said, gold in answerable])
    return Measured({"rouge_l": float(scores.mean())}, {"rouge_l": mean_interval(scores, seed=seed)})


def prediction_text(text: str) -> str:
    """The answer in what the model said: nothing, if it said `unanswerable` (in any case, with a full stop or not)."""
    return "" if normalize_answer(text) == UNANSWERABLE else text


def exact_match(prediction: str, gold_answers: Sequence[str]) -> float:
    """1.0 if the prediction equals any gold answer after normalization, else 0.0."""
    normalized = normalize_answer(prediction)
    return max(float(normalize_answer(gold) == normalized) for gold in _scorable(gold_answers))


def f1_score(prediction: str, gold_answers: Sequence[str]) -> float:
    """Harmonic mean of token precision and recall, the best over the gold answers."""
    tokens = normalize_answer(prediction).split()
    return max(_token_f1(tokens, normalize_answer(gold).split()) for gold in _scorable(gold_answers))


def normalize_answer(text: str) -> str:
    """Lower case, then without punctuation, then without articles, then single spaces; the order matters."""
    without_punctuation = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", without_punctuation).split())


def wilson_interval(num_right: int, num_examples: int) -> tuple[float, float]:
    """95% score interval of a share (Wilson 1927): inside [0, 1], and of a sensible width at 0 and at 1 too."""
    share, z_squared = num_right / num_examples, Z_95**2
    center = (share + z_squared / (2 * num_examples)) / (1 + z_squared / num_examples)
    half = Z_95 * math.sqrt(share * (1 - share) / num_examples + z_squared / (4 * num_examples**2))
    half /= 1 + z_squared / num_examples
    # At the ends the formula is exact, but rounding may fall a few ulp to the wrong side of them.
    return (0.0 if num_right == 0 else center - half, 1.0 if num_right == num_examples else center + half)


def mean_interval(scores: np.ndarray, *, seed: int) -> tuple[float, float]:
    """95% interval of the mean of scores in [0, 1]: Wilson's where all are 0 or 1, else the percentile bootstrap.

    A resample of `n` scores is a multinomial draw over the distinct scores, of which F1 has few: so ten thousand
    resamples of a whole development set are one small matrix product.
    """
    values, counts = np.unique(scores, return_counts=True)
    if np.isin(values, (0.0, 1.0)).all():
        return wilson_interval(int(scores.sum()), len(scores))
    draws = np.random.default_rng(seed).multinomial(len(scores), counts / len(scores), size=BOOTSTRAP_RESAMPLES)
    low, high = np.quantile(draws @ values / len(scores), (0.025, 0.975))
    return float(low), float(high)


def join(parts: Iterable[Measured], *, prefix: str) -> Measured:
    """One `Measured` of several, each name after `prefix`."""
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for part in parts:
        metrics |= {prefix + name: value for name, value in part.metrics.items()}
        intervals |= {prefix + name: interval for name, interval in part.intervals.items()}
    return Measured(metrics, intervals)


def _scorable(gold_answers: Sequence[str]) -> Sequence[str]:
    # As in the official script: gold answers that normalize to nothing do not count, and where none is left the only
    # right prediction is the empty one.
    return [gold for gold in gold_answers if normalize_answer(gold)] or [""]


def _token_f1(prediction: list[str], gold: list[str]) -> float:
    if not prediction or not gold:
        return float(prediction == gold)
    num_same = (Counter(prediction) & Counter(gold)).total()
    if num_same == 0:
        return 0.0
    precision, recall = num_same / len(prediction), num_same / len(gold)
    return 2 * precision * recall / (precision + recall)


def _exp(loss: float) -> float:
    # A loss that is not finite, or absurd, must reach the log as it is, and not end the evaluation.
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan
