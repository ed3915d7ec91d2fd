"""One result ahead: in order, no further, errors where their result would have come, and no thread left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from trietune.training.prefetch import ahead_thread, prefetch


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("trietune-ahead")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert threads() == []


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_results_come_in_order(count: int) -> None:
    assert list(prefetch(lambda n: n * n, range(count))) == [n * n for n in range(count)]


def test_the_next_one_is_computed_while_one_is_in_use_and_no_further() -> None:
    done = [threading.Event() for _ in range(5)]
    for number in (results := prefetch(lambda n: done[n].set() or n, range(5))):
        if number < 4:
            assert done[number + 1].wait(10)
        assert not any(event.is_set() for event in done[number + 2 :])
        if number == 3:
            results.close()
            break
    assert done[4].is_set()


def test_it_is_computed_in_a_thread_of_its_own() -> None:
    names = set(prefetch(lambda _: threading.current_thread().name, range(3)))
    assert len(names) == 1
    assert names != {threading.current_thread().name}


def test_an_error_comes_after_the_results_before_it() -> None:
    results = prefetch(lambda n: 6 // (3 - n), range(6))
    assert [next(results) for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_an_error_that_is_never_reached_is_not_raised() -> None:
    results = prefetch(lambda n: 1 // (1 - n), range(2))
    assert next(results) == 1
    results.close()


def test_leaving_by_an_exception_ends_the_thread() -> None:
    def leave() -> None:
        for value in prefetch(lambda n: n, range(9)):
            assert threads() != []
            if value == 2:
                raise KeyError

    with pytest.raises(KeyError):
        leave()


def test_a_thread_that_is_there_is_used_again_when_none_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with ahead_thread() as thread:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            threading.Thread().start()
        for _ in range(3):
            results = prefetch(lambda n: n * n, range(4), thread)
            assert [next(results), next(results)] == [0, 1]
            results.close()
        assert list(prefetch(lambda n: n * n, range(4), thread)) == [0, 1, 4, 9]
        monkeypatch.undo()
