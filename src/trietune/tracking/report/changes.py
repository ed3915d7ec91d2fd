"""What training changed, example by example: fixed, broken, still wrong, still right; and sums over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trietune.tracking.events import Prediction
from trietune.tracking.report.paired import PairedTest, compare_scores
from trietune.tracking.report.record import RunRecord

MOST_ROWS = 1000
LONGEST_PROMPT = 1200
LONGEST_ANSWER = 400
# Changed ones first: what got worse is what one must see.
OUTCOMES = ("broken", "fixed", "still wrong", "still right")
_MOST_CLASSES = 12
_NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class Row:
    """One example; `before` is None where nothing was said before training."""

    outcome: str
    id: str
    prompt: str
    expected: str
    before: str | None
    after: str
    share: float | None


@dataclass(frozen=True, slots=True)
class Changes:
    """Attributes:
    rows: at most `MOST_ROWS`, changed ones first.
    counts: examples by outcome, over all of them.
    num_left_out: examples without a row.
    tests: before against after.
    classes: for labels, `(name, examples, recall, precision, F1)` after training.
    confusion: for labels; rows are what was expected.
    groups: for questions, `(name, examples, exact match, F1)` after training.
    calibration: for labels, `(mean probability, share right, examples)` by tenth of the probability.
    calibration_error: mean distance of the two, weighted by examples.
    """

    rows: Sequence[Row]
    counts: Mapping[str, int]
    num_left_out: int
    tests: Sequence[PairedTest]
    classes: Sequence[tuple[str, int, float, float, float]]
    confusion: Sequence[tuple[str, Sequence[int]]]
    groups: Sequence[tuple[str, int, float, float]]
    calibration: Sequence[tuple[float, float, int]]
    calibration_error: float | None


def changes_of(run: RunRecord) -> Changes | None:
    """What the run's predictions tell; None if it has none."""
    after = run.predictions
    if not after:
        return None
    before = run.before if run.predicted_when == "after" else {}
    rows = [_row(prediction, before.get(prediction.id)) for prediction in after]
    order = {outcome: number for number, outcome in enumerate(OUTCOMES)}
    tally = Counter(row.outcome for row in rows)
    ordered = sorted(rows, key=lambda row: order.get(row.outcome, len(order)))
    labeled = [prediction for prediction in after if prediction.probabilities]
    bins = _calibration(labeled)
    return Changes(
        rows=ordered[:MOST_ROWS],
        counts={outcome: tally[outcome] for outcome in (*OUTCOMES, "right", "wrong") if tally[outcome]},
        num_left_out=max(0, len(rows) - MOST_ROWS),
        tests=paired_tests([before[p.id] for p in after if p.id in before], [p for p in after if p.id in before]),
        classes=_classes(labeled),
        confusion=_confusion(labeled),
        groups=_groups(after),
        calibration=bins,
        calibration_error=_calibration_error(bins),
    )


def paired_tests(first: Sequence[Prediction], second: Sequence[Prediction]) -> list[PairedTest]:
    """`second` against `first`, which answer the same examples in the same order."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a.is_right is not None and b.is_right is not None]
    if not pairs:
        return []
    is_question = pairs[0][1].f1 is not None
    name = "exact match" if is_question else "accuracy"
    tests = [
        compare_scores(name, [float(bool(a.is_right)) for a, _ in pairs], [float(bool(b.is_right)) for _, b in pairs])
    ]
    if is_question and all(a.f1 is not None and b.f1 is not None for a, b in pairs):
        tests.append(compare_scores("F1", [a.f1 or 0.0 for a, _ in pairs], [b.f1 or 0.0 for _, b in pairs]))
    return tests


def _row(after: Prediction, before: Prediction | None) -> Row:
    return Row(
        outcome=_outcome(before, after),
        id=after.id,
        prompt=_middle_out(after.prompt.strip(), LONGEST_PROMPT),
        expected=_middle_out(after.expected, LONGEST_ANSWER),
        before=None if before is None else _middle_out(before.predicted, LONGEST_ANSWER),
        after=_middle_out(after.predicted, LONGEST_ANSWER),
        share=after.probabilities.get(after.predicted) if after.probabilities else None,
    )


def _outcome(before: Prediction | None, after: Prediction) -> str:
    if after.is_right is None:
        return ""
    if before is None or before.is_right is None:
        return "right" if after.is_right else "wrong"
    if before.is_right == after.is_right:
        return "still right" if after.is_right else "still wrong"
    return "fixed" if after.is_right else "broken"


def _middle_out(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} [{len(text) - 2 * half:,} characters left out] {text[-half:]}"


def _names(predictions: Sequence[Prediction]) -> list[str]:
    return list(dict.fromkeys(name for prediction in predictions for name in prediction.probabilities))


def _classes(predictions: Sequence[Prediction]) -> list[tuple[str, int, float, float, float]]:
    found = []
    for name in _names(predictions):
        right = sum(p.expected == name == p.predicted for p in predictions)
        expected = sum(p.expected == name for p in predictions)
        said = sum(p.predicted == name for p in predictions)
        recall, precision = right / max(1, expected), right / max(1, said)
        found.append((name, expected, recall, precision, 2 * right / max(1, expected + said)))
    return found


def _confusion(predictions: Sequence[Prediction]) -> list[tuple[str, list[int]]]:
    names = _names(predictions)
    if not 2 <= len(names) <= _MOST_CLASSES:
        return []
    pairs = Counter((p.expected, p.predicted) for p in predictions)
    return [(name, [pairs[name, said] for said in names]) for name in names]


def _groups(predictions: Sequence[Prediction]) -> list[tuple[str, int, float, float]]:
    """Questions by whether they can be answered, and by the length of their prompt, in thirds."""
    questions = [p for p in predictions if p.f1 is not None]
    if not questions:
        return []
    found = [(kind, [p for p in questions if p.kind == kind]) for kind in ("answerable", "unanswerable")]
    by_length = sorted(questions, key=lambda p: len(p.prompt))
    third = len(by_length) / 3
    for number, name in enumerate(("shortest", "middle", "longest")):
        part = by_length[round(number * third) : round((number + 1) * third)]
        if part:
            found.append((f"{name} prompts, up to {len(part[-1].prompt):,} characters", part))
    return [
        (name, len(part), sum(bool(p.is_right) for p in part) / len(part), sum(p.f1 or 0.0 for p in part) / len(part))
        for name, part in found
        if part
    ]


def _calibration(predictions: Sequence[Prediction]) -> list[tuple[float, float, int]]:
    bins: dict[int, list[tuple[float, bool]]] = {}
    for prediction in predictions:
        share = prediction.probabilities.get(prediction.predicted)
        if isinstance(share, (int, float)):
            bins.setdefault(min(_NUM_BINS - 1, int(share * _NUM_BINS)), []).append((share, bool(prediction.is_right)))
    return [
        (sum(share for share, _ in found) / len(found), sum(right for _, right in found) / len(found), len(found))
        for _, found in sorted(bins.items())
    ]


def _calibration_error(bins: Sequence[tuple[float, float, int]]) -> float | None:
    total = sum(count for _, _, count in bins)
    return sum(abs(said - right) * count for said, right, count in bins) / total if total else None


def left_out_of(changes: Changes) -> str:
    """`9,000 of 10,000 examples have no row here; all are in predictions.jsonl`; empty if every one has."""
    if not changes.num_left_out:
        return ""
    total: object = changes.num_left_out + len(changes.rows)
    return f"{changes.num_left_out:,} of {total:,} examples have no row here; all are in predictions.jsonl"
