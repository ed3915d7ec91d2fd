"""The policy, on the worked case of its docstring and on thousands of made-up histories."""

from __future__ import annotations

import math
from typing import Literal

from hypothesis import given, settings
from hypothesis import strategies as st

from trietune.checkpoints.retention import Ranked, best_first, kept_steps, removable_steps

VALUES = st.one_of(st.none(), st.sampled_from([0.1, 0.2, 0.2, math.nan, math.inf, -math.inf, 3]), st.floats())
HISTORIES = st.lists(st.tuples(VALUES, st.booleans()), max_size=12).map(
    lambda items: [Ranked(50 * (n + 1), value, is_whole) for n, (value, is_whole) in enumerate(items)]
)


def test_the_case_of_the_docstring() -> None:
    losses = [0.40, 0.31, None, 0.35, math.nan, 0.33, 0.36]
    history = [Ranked(50 * (n + 1), loss, is_whole=n != 2) for n, loss in enumerate(losses)]
    assert removable_steps(history, keep_last_n=2, keep_best_n=1, mode="min", pinned={250}) == [50, 200]


def test_of_equals_the_newer_is_best() -> None:
    history = [Ranked(50, 0.2), Ranked(100, 0.2), Ranked(150, 0.1)]
    assert [item.step for item in best_first(history, "max")] == [100, 50, 150]


@settings(max_examples=1_000)
@given(HISTORIES, st.integers(0, 4), st.integers(0, 4), st.sampled_from(["min", "max"]), st.sets(st.integers(0, 600)))
def test_laws_of_retention(
    history: list[Ranked], keep_last_n: int, keep_best_n: int, mode: Literal["min", "max"], pinned: set[int]
) -> None:
    limits = {"keep_last_n": keep_last_n, "keep_best_n": keep_best_n}
    removed = set(removable_steps(history, mode=mode, pinned=pinned, **limits))
    whole = {item.step for item in history if item.is_whole}
    left = whole - removed
    assert removed <= whole, "damaged ones are for a person to look at"
    assert not removed & pinned
    assert bool(left) == bool(whole), "never the last whole one"
    assert set(sorted(whole)[max(0, len(whole) - keep_last_n) :]) <= left
    values = {item.step: item.value for item in history if item.is_whole and item.value is not None}
    finite = {step: value for step, value in values.items() if math.isfinite(value)}
    best = sorted(finite, key=lambda step: (finite[step] if mode == "min" else -finite[step], -step))[:keep_best_n]
    assert set(best) <= left
    allowance = keep_last_n + keep_best_n
    assert len(left - pinned) <= max(allowance, 1)
    assert kept_steps(history, mode=mode, **limits) <= left


def test_values_measured_on_something_else_are_not_compared() -> None:
    found = [Ranked(50, 0.9, measured_on="a"), Ranked(100, 0.8, measured_on="a"), Ranked(150, 0.1, measured_on="b")]
    assert [item.step for item in best_first(found, "min")] == [150]
    assert [item.step for item in best_first(found, "min", "a")] == [100, 50]
    assert [item.step for item in best_first(found, "min", "never")] == [150]
    assert kept_steps(found, keep_last_n=0, keep_best_n=1, mode="min") == {100, 150}
