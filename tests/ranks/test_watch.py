"""Whoever the others wait for is named: a rank that computes for too long, one that is silent, one that has ended."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ranks.pool import free_port
from trietune.errors import EXIT_RANK_LOST, UserError
from trietune.ranks import watch
from trietune.ranks.watch import Watch

Start = Callable[[int], tuple[Watch, list[UserError]]]
WHO = r"\(host \S+, process \d+\)"


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr(watch, "BEAT_S", 0.05)
    monkeypatch.setattr(watch, "SILENT_S", 1.5)
    monkeypatch.setattr(watch, "SILENT_AFTER_BREAK_S", 1.0)
    port = free_port()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    watches: list[Watch] = []

    def open_one(number: int) -> tuple[Watch, list[UserError]]:
        heard: list[UserError] = []
        watches.append(Watch(number, 2, "127.0.0.1", port, on_lost=heard.append, shortest_limit_s=1.0))
        return watches[-1], heard

    yield open_one
    for one in watches:
        one.close()
    del store


def wait_for(heard: list[UserError]) -> str:
    deadline = time.monotonic() + 60
    while not heard:
        assert time.monotonic() < deadline, "nobody was named"
        time.sleep(0.05)
    assert heard[0].exit_code == EXIT_RANK_LOST
    return str(heard[0])


def fall_silent(one: Watch) -> None:
    """What SIGSTOP does: no more beats."""
    one._stopped.set()
    for thread in one._threads:
        thread.join()


def test_a_rank_that_computes_for_too_long_is_named(start: Start) -> None:
    (waiting, heard), (computing, heard_there) = start(0), start(1)
    waiting.newest_checkpoint = "checkpoints/step-00000100"
    computing.at("computing", 120)
    waiting.at("waiting", 120)
    text = wait_for(heard)
    assert re.search(rf"error: rank 1 {WHO} has been computing step 120 for \d+ s; the others wait for it", text)
    assert "next:  checkpoints/step-00000100 is whole; the same command with `--resume` continues" in text
    assert not heard_there


def test_a_rank_that_prepares_or_whose_steps_are_slow_is_waited_for(start: Start) -> None:
    (waiting, heard), (other, _) = start(0), start(1)
    waiting.at("waiting", 0)
    time.sleep(1.5)
    other._slowest_step = 100.0
    other.at("computing", 1)
    time.sleep(1.5)
    assert not heard


def test_a_silent_rank_is_named_with_what_it_did(start: Start) -> None:
    (waiting, heard), (silent, _) = start(0), start(1)
    silent.at("saving", 7)
    time.sleep(0.5)
    fall_silent(silent)
    waiting.at("waiting", 8)
    text = wait_for(heard)
    assert re.search(rf"rank 1 {WHO} has not been heard of for \d+ s; it was saving step 7", text)
    assert "there is no checkpoint yet" in text


def test_after_a_broken_connection_the_rank_that_went_is_named(start: Start) -> None:
    (waiting, _), (gone, _) = start(0), start(1)
    gone.at("computing", 3)
    time.sleep(0.5)
    fall_silent(gone)
    assert re.search(rf"rank 1 {WHO} has not been heard of", str(waiting.name_lost("Connection closed by peer")))


def test_a_rank_that_has_ended_is_named_as_such(start: Start) -> None:
    (waiting, _), (done, _) = start(0), start(1)
    done.at("computing", 3)
    time.sleep(0.3)
    done.close()
    assert re.search(rf"rank 1 {WHO} has ended, at step 3", str(waiting.name_lost("Connection closed by peer")))
