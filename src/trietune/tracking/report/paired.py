"""Whether two sets of answers to the same examples differ by more than chance.

    right in one, wrong in the other: McNemar's exact test. 30 fixed and 10 broken of 280 give p = 0.0022
    any score per example: the bootstrap of the mean difference

Both are paired: the same examples were asked twice, so what both got right says nothing about which is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class PairedTest:
    """How much better the second is than the first.

    Attributes:
        name: what was compared, such as `accuracy`.
        num_examples: answered by both.
        num_better, num_worse: examples on which the second did better, or worse.
        difference: difference of the means.
        interval: 95%, of the difference, by the bootstrap over examples.
        p_value: two-sided, of no difference: McNemar's exact test for right and wrong, a sign-flip test for scores.
    """

    name: str
    num_examples: int
    num_better: int
    num_worse: int
    difference: float
    interval: tuple[float, float]
    p_value: float

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.interval)
        p = f"p = {self.p_value:.2g}" if self.p_value >= 1e-4 else "p < 0.0001"
        return (
            f"{self.name}: {100 * self.difference:+.1f} points ({low:+.1f} to {high:+.1f}), {self.num_better:,} better "
            f"and {self.num_worse:,} worse of {self.num_examples:,} examples, {p}"
        )


def compare_scores(name: str, first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """The paired test of scores from 0 to 1, `second` against `first`, example by example."""
    before, after = np.asarray(first, np.float64), np.asarray(second, np.float64)
    change = after - before
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    is_binary = bool(np.isin(before, (0.0, 1.0)).all() and np.isin(after, (0.0, 1.0)).all())
    values, counts = np.unique(change, return_counts=True)
    generator = np.random.default_rng(0)
    draws = generator.multinomial(len(change), counts / len(change), size=RESAMPLES) @ values / len(change)
    low, high = np.quantile(draws, (0.025, 0.975))
    return PairedTest(
        name=name,
        num_examples=len(change),
        num_better=better,
        num_worse=worse,
        difference=float(change.mean()),
        interval=(float(low), float(high)),
        p_value=mcnemar(better, worse) if is_binary else _sign_flips(change, generator),
    )


def mcnemar(num_fixed: int, num_broken: int) -> float:
    """McNemar's exact test (1947): two-sided, the binomial with probability one half over what changed."""
    n, fewest = num_fixed + num_broken, min(num_fixed, num_broken)
    if n == 0:
        return 1.0
    # Logarithms, for the powers of two of ten thousand changed examples do not fit into floats.
    terms = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(fewest + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(term) for term in terms))


def _sign_flips(change: np.ndarray, generator: np.random.Generator) -> float:
    """Share of random signs that give a mean at least as far from zero (with the usual one added)."""
    kept = change[change != 0]
    if len(kept) == 0:
        return 1.0
    observed, extreme = abs(kept.sum()) - 1e-12, 0
    for _ in range(RESAMPLES // 500):
        signs = generator.integers(0, 2, size=(500, len(kept)), dtype=np.int8) * 2.0 - 1.0
        extreme += int((np.abs(signs @ kept) >= observed).sum())
    return (extreme + 1) / (RESAMPLES + 1)
