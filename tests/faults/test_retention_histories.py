"""Retention against a model, over thousands of made-up lives of a run: saves, pins, damage, restarts, removals."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fault_table import Tally
from trietune.checkpoints.retention import Ranked, removable_steps
from trietune.checkpoints.store import CheckpointStore

MEMORY = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
LOSSES = st.one_of(st.none(), st.sampled_from([0.1, 0.2, 0.3, math.nan, math.inf]), st.floats(-5, 5))
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("save"), LOSSES),
        st.tuples(st.just("save"), LOSSES),
        st.tuples(st.just("pin"), st.integers(0, 5)),
        st.tuples(st.just("unpin"), st.integers(0, 5)),
        st.tuples(st.just("damage"), st.integers(0, 5)),
        st.tuples(st.just("restart"), st.none()),
    ),
    max_size=14,
)
LIMITS = st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from(["min", "max"]))


def model_of_retention(
    history: dict[int, float | None], last: int, best: int, mode: Literal["min", "max"], pinned: set[int]
) -> set[int]:
    """What may stay, said in another way than the policy says it: who is beaten by how many."""

    def finite(value: float | None) -> bool:
        return value is not None and math.isfinite(value)

    def beats(one: int, other: int) -> bool:
        a, b = history[one], history[other]
        assert a is not None
        assert b is not None
        return (a < b if mode == "min" else a > b) or (a == b and one > other)

    stay = set()
    for step, value in history.items():
        newer = sum(other > step for other in history)
        better = sum(finite(rival) and finite(value) and beats(other, step) for other, rival in history.items())
        if newer < last or (finite(value) and better < best):
            stay.add(step)
    if not stay and history:
        stay = {max(history)}
    return stay | (pinned & set(history))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_histories_in_memory(tally: Tally) -> None:
    num_tried = 0

    @settings(max_examples=10_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(EVENTS, LIMITS)
    def live(events: list[Any], limits: tuple[int, int, Literal["min", "max"]]) -> None:
        nonlocal num_tried
        num_tried += 1
        last, best, mode = limits
        present: dict[int, float | None] = {}
        damaged: set[int] = set()
        pinned: set[int] = set()
        step = 0
        for what, value in events:
            order = sorted(present)
            if what == "pin" and order:
                pinned.add(order[value % len(order)])
            elif what == "unpin" and pinned:
                pinned.discard(sorted(pinned)[value % len(pinned)])
            elif what == "damage" and order:
                damaged.add(order[value % len(order)])
            elif what == "save":
                step += 50
                present[step] = value
                items = [Ranked(number, loss, number not in damaged) for number, loss in present.items()]
                removed = removable_steps(items, keep_last_n=last, keep_best_n=best, mode=mode, pinned=pinned)
                whole = {number: loss for number, loss in present.items() if number not in damaged}
                assert set(whole) - set(removed) == model_of_retention(whole, last, best, mode, pinned)
                for number in removed:
                    del present[number]

    live()
    tally("retention, histories in memory", num_tried, num_tried)
    assert num_tried >= 10_000


def live_on_disk(folder: Path, events: list[Any], limits: tuple[int, int, Literal["min", "max"]]) -> None:
    """The same on a real directory; damage is real, and only what the reader can see of it counts."""
    last, best, mode = limits

    def start() -> CheckpointStore:
        store = CheckpointStore(folder, "run1", last, best, "eval/loss", mode)
        store.clean_leftovers()
        return store

    store, step = start(), 0
    pins: dict[int, Any] = {}
    saved: dict[int, float | None] = {}
    damaged: set[int] = set()
    for what, value in events:
        order = [item.step for item in store.scan() if item.damage is None]
        if what == "pin" and order:
            number = order[value % len(order)]
            if number not in pins:
                pins[number] = store.pinned(number)
                pins[number].__enter__()
        elif what == "unpin" and pins:
            pins.pop(sorted(pins)[value % len(pins)]).__exit__(None, None, None)
        elif what == "damage" and order:
            number = order[value % len(order)]
            damaged.add(number)
            os.truncate(store.folder / f"step-{number:08d}" / "weights.bin", 3)
        elif what == "restart":
            pins.clear()
            store = start()
        elif what == "save":
            step += 50
            before = {item.step for item in store.scan()}
            store.save(step, {"weights.bin": b"x" * 100}, metrics={"eval/loss": value})
            saved[step] = value
            whole = {number: saved[number] for number in {*before, step} - damaged}
            expected = model_of_retention(whole, last, best, mode, set(pins)) | (before & damaged)
            assert {item.step for item in store.scan()} == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_histories_on_disk(tally: Tally) -> None:
    num_tried = 0

    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(EVENTS, LIMITS)
    def live(events: list[Any], limits: tuple[int, int, Literal["min", "max"]]) -> None:
        nonlocal num_tried
        num_tried += 1
        folder = Path(tempfile.mkdtemp(dir=MEMORY))
        try:
            live_on_disk(folder, events, limits)
        finally:
            shutil.rmtree(folder)

    live()
    tally("retention, histories on disk", num_tried, num_tried)
    assert num_tried >= 100


def test_two_runs_in_one_project_do_not_touch_each_other(tmp_path: Path) -> None:
    def save(name: str, step: int) -> Any:
        (tmp_path / name).mkdir(exist_ok=True)
        store = CheckpointStore(tmp_path / name, name, 1, 0, "eval/loss", "min")
        return store.save(step, {"weights.bin": b"x"}).path

    for step in (50, 100, 150):
        save("one", step)
        save("two", step + 1)
    assert [path.name for path in (tmp_path / "one/checkpoints").iterdir()] == ["step-00000150"]
    assert [path.name for path in (tmp_path / "two/checkpoints").iterdir()] == ["step-00000151"]
