"""How often a model prefers what people preferred, and what its objective makes of that.

Every answer of the set is scored in tries, sorted, so that answers share their prompts and beginnings. What the scores
mean is for the caller to say: an objective of training, which this package does not know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from trietune.data.answers import AnswerSets
from trietune.evaluation.evaluate import Evaluation, choose_examples, own_places, put_together
from trietune.evaluation.metrics import Z_95, Measured, join, wilson_interval
from trietune.evaluation.scoring import CheckStop, Progress, ScoringModel, no_progress, no_stop, sequence_losses
from trietune.ranks.ranks import ALONE, Ranks
from trietune.trie import Batching

# From rows, scores and numbers of labels (both float64, one an answer) to metrics and intervals.
Judge = Callable[[np.ndarray, np.ndarray, np.ndarray], Measured]


def evaluate_answers(
    model: ScoringModel,
    sets: AnswerSets,
    judge: Judge,
    *,
    batching: Batching,
    max_positions: int,
    max_examples: int | None = None,
    seed: int = 0,
    check_stop: CheckStop = no_stop,
    progress: Progress = no_progress,
    ranks: Ranks = ALONE,
    parts: Sequence[tuple[str, int]] = (),
) -> Evaluation:
    """Score the answers of a set and measure them by `judge`; names begin with `eval/`.

    Args:
        max_examples: size limit: of a larger set, a random subset of rows that depends only on `seed`; None takes all.
        parts: name and number of rows of each data set that the set was joined of: each is measured as `eval/NAME/`,
            too.
    """
    rows = choose_examples(sets.num_rows, max_examples, seed=seed)
    scores, counts = score_answers(
        model,
        sets,
        sets.sequences_of(rows),
        batching=batching,
        max_positions=max_positions,
        check_stop=check_stop,
        progress=progress,
        ranks=ranks,
    )
    measured = [join([judge(rows, scores, counts)], prefix="eval/")]
    number_of_row = np.repeat(np.arange(len(rows)), sets.row_start[rows + 1] - sets.row_start[rows])
    begin = 0
    for name, num_rows in parts:
        is_here = (rows >= begin) & (rows < begin + num_rows)
        begin += num_rows
        if is_here.any():
            of_part = is_here[number_of_row]
            found = judge(rows[is_here], scores[of_part], counts[of_part])
            measured.append(join([found], prefix=f"eval/{name}/"))
    joined = join(measured, prefix="")
    return Evaluation(joined.metrics, joined.intervals, len(rows), [])


def score_answers(
    model: ScoringModel,
    sets: AnswerSets,
    sequences: np.ndarray,
    *,
    batching: Batching,
    max_positions: int,
    check_stop: CheckStop,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the label log-probabilities of these sequences, and how many labels each has; both float64 [E].

    Over several ranks each scores a part, and all get the scores of the whole.
    """
    mine = own_places(sets, sequences, ranks, batching)
    losses, counts = ranks.together(
        lambda: sequence_losses(
            model,
            sets,
            sequences[mine],
            batching=batching,
            max_positions=max_positions,
            check_stop=check_stop,
            progress=progress,
        )
    )
    num = len(sequences)
    return -put_together(ranks, mine, losses, num), put_together(ranks, mine, counts, num)


def measure_share(name: str, is_right: np.ndarray, row: np.ndarray) -> Measured:
    """Share of pairs in which the better answer won, with its 95% interval; empty without pairs.

    Rows are what was drawn. With one pair per row the interval is Wilson's; pairs of one row stand and fall together,
    so otherwise it is that of a ratio of two means over the rows, by the delta method.

    Args:
        is_right: bool [P].
        row: int64 [P], of each pair.
    """
    if not len(is_right):
        return Measured()
    share = float(np.mean(is_right))
    _, of_pair = np.unique(row, return_inverse=True)
    pairs = np.bincount(of_pair).astype(np.float64)
    if pairs.max() == 1:
        return Measured({name: share}, {name: wilson_interval(int(np.sum(is_right)), len(is_right))})
    if len(pairs) < 2:
        return Measured({name: share})
    residuals = np.bincount(of_pair, weights=is_right.astype(np.float64)) - share * pairs
    error = math.sqrt(float(residuals @ residuals) * len(pairs) / (len(pairs) - 1)) / float(pairs.sum())
    return Measured({name: share}, {name: (max(0.0, share - Z_95 * error), min(1.0, share + Z_95 * error))})


def joined(metrics: Mapping[str, float], *parts: Measured) -> Measured:
    """Plain metrics and measured ones as one."""
    return join([Measured(metrics), *parts], prefix="")
