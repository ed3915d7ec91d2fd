"""Processes that do not come together are named within a time that ends, and a signal is heard meanwhile."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest

from ranks.pool import free_port
from trietune.errors import EXIT_RANK_LOST, StopRequested, UserError
from trietune.ranks import meeting
from trietune.ranks.launched import Launched
from trietune.ranks.meeting import meet, waited_for


@pytest.fixture
def at_port(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], UserError]:
    """How rank NUMBER of two fails to meet the other one at a port, within a second."""
    monkeypatch.setattr(meeting, "MEET_WITHIN_S", 1.0)

    def fail(number: int, port: int) -> UserError:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError) as raised:
            meet(Launched(number, 2, number, 2), "127.0.0.1", port, check=lambda: None)
        assert raised.value.exit_code == EXIT_RANK_LOST
        return raised.value

    return fail


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_whose_others_never_come_ends(number: int, at_port: Callable[[int, int], UserError]) -> None:
    assert f"rank {number} of 2 did not meet the other processes at 127.0.0.1:" in at_port(number, free_port()).what


def test_a_port_that_is_taken_is_named(at_port: Callable[[int, int], UserError]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert at_port(0, port).what == f"port {port} of this machine is taken"


def test_whoever_waits_for_long_says_so_and_hears_a_signal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meeting, "SAID_AFTER_S", 0.0)
    monkeypatch.setattr(meeting, "POLL_S", 0.01)
    never = threading.Event()
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise StopRequested("SIGTERM", 143)

    try:
        with pytest.raises(StopRequested):
            waited_for(never.wait, "rank 1 of 2 waits", check=check)
    finally:
        never.set()
    assert capfd.readouterr().err == "rank 1 of 2 waits\n"


def test_what_is_waited_for_comes_back_or_is_raised() -> None:
    assert waited_for(lambda: 5, "", check=lambda: None) == 5
    with pytest.raises(ZeroDivisionError):
        waited_for(lambda: 1 // 0, "", check=lambda: None)
