"""Who is it that the others wait for? A thread in each process that shares where its rank is, and names the one lost.

    rank 0   waiting in step 12      rank 0 says:  rank 1 (host b, process 812) has been computing step 12 for 61 s;
    rank 1   computing step 12                     the others wait for it

The main thread only notes where it is. One thread publishes that every few seconds in the store that keeps the
processes together and, while its own rank waits, looks at the others. Another one only looks at the clock, since an
operation of the store stands still on a line that is cut. gloo's and NCCL's own time-outs name an operation, never a
rank, and end a process without an exception that could be caught.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # they have no other home

from trietune.errors import EXIT_RANK_LOST, UserError
from trietune.io.json_types import JsonObject

BEAT_S = 2.0
# Without a beat for this long, a process has gone or is stopped; beats continue while it computes.
SILENT_S = 20.0
# After a connection has ended, so few missed beats are proof enough.
SILENT_AFTER_BREAK_S = 5.0
NAMED_WITHIN_S = 18.0
CUT_OFF_S = 30.0
# A step may take this long, or ten times the slowest so far; other phases may take longer.
SHORTEST_LIMIT_S, TIMES_SLOWEST = 60.0, 10
OTHER_PHASES_LIMIT_S = 1800.0
# A process that has come to the store speaks at once, unless its machine is very slow.
NEVER_HEARD_OF_S = 120.0
# Phases without a limit: a model may be downloaded.
UNLIMITED = ("preparing", "waiting", "done")


class Watch:
    """This rank's place, told to the others, and theirs.

    Args:
        number, count: this rank's number, and how many there are.
        host, port: address of the store.
        on_lost: told the sentence when a process is lost; by default it is printed and the process ends with code 7.

    Attributes:
        newest_checkpoint: for the message, where there is one.
    """

    def __init__(
        self,
        number: int,
        count: int,
        host: str,
        port: int,
        *,
        on_lost: Callable[[UserError], None] | None = None,
        shortest_limit_s: float = SHORTEST_LIMIT_S,
    ) -> None:
        self._number, self._count = number, count
        self._on_lost = on_lost or _end_process
        self._shortest_limit_s = shortest_limit_s
        self.newest_checkpoint: str | None = None
        self._phase, self._step, self._since = "preparing", 0, time.monotonic()
        self._slowest_step = 0.0
        self._who = f"host {socket.gethostname()}, process {os.getpid()}"
        self._seen: dict[int, tuple[tuple[object, ...], float, JsonObject]] = {}
        self._stopped = threading.Event()
        self._answered = self._began = time.monotonic()
        # A connection of its own: the main thread's may stand still in a collective.
        self._store = PrefixStore(
            "trietune-watch",
            TCPStore(
                host, port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=CUT_OFF_S)
            ),
        )
        # Before the first step: a rank that never spoke could not be named.
        self._publish(0)
        self._threads = [
            threading.Thread(target=target, daemon=True, name=name)
            for target, name in ((self._talk, "trietune-watch"), (self._look_at_clock, "trietune-clock"))
        ]
        for thread in self._threads:
            thread.start()

    def at(self, phase: str, step: int) -> None:
        """This rank has begun `phase` of `step`."""
        now = time.monotonic()
        if self._phase == "computing":
            self._slowest_step = max(self._slowest_step, now - self._since)
        self._phase, self._step, self._since = phase, step, now

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """This rank is in `phase` meanwhile, and where it was afterwards."""
        before = self._phase
        self.at(phase, self._step)
        yield
        self.at(before, self._step)

    def name_lost(self, broken: str) -> UserError:
        """The error after a connection has broken: who it was that went, as soon as that is known."""
        deadline = time.monotonic() + NAMED_WITHIN_S
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                if lost := self._silent(SILENT_AFTER_BREAK_S) or self._left():
                    return self._error("; ".join(lost))
            time.sleep(0.5)
        return self._error(f"the connection to another process ended: {' '.join(broken.split())[:200]}")

    def close(self) -> None:
        """Say that this rank is done, and stop looking at the others."""
        self.at("done", self._step)
        self._stopped.set()
        self._threads[0].join(BEAT_S)
        with contextlib.suppress(Exception):
            self._publish(-1)

    def _publish(self, beat: int) -> None:
        place = {
            "phase": self._phase,
            "step": self._step,
            "for": time.monotonic() - self._since,
            "slowest": self._slowest_step,
            "who": self._who,
            "beat": beat,
        }
        self._store.set(str(self._number), json.dumps(place))

    def _talk(self) -> None:
        beat = 0
        while not self._stopped.wait(BEAT_S):
            beat += 1
            with contextlib.suppress(Exception):
                self._publish(beat)
                self._read(self._number)  # an answer: what is set is only sent
                self._answered = time.monotonic()
                lost = self._silent(SILENT_S)
                if self._phase == "waiting":
                    lost = lost or self._too_long()
                if lost and self._phase == "waiting":
                    self._on_lost(self._error("; ".join(lost)))
                    return

    def _look_at_clock(self) -> None:
        while not self._stopped.wait(BEAT_S):
            silent = time.monotonic() - self._answered
            if silent > CUT_OFF_S and self._phase == "waiting":
                self._on_lost(
                    self._error(
                        f"this rank ({self._number}, {self._who}) is cut off: no answer from the machine that keeps "
                        f"the processes together for {silent:.0f} s"
                    )
                )
                return

    def _read(self, number: int) -> JsonObject:
        place: JsonObject = json.loads(self._store.get(str(number)))
        return place

    def _silent(self, limit_s: float) -> list[str]:
        """Sentences on the ranks that have not been heard of for `limit_s`."""
        now = time.monotonic()
        lost = []
        for number in self._others():
            if not self._store.check([str(number)]):
                if now - self._began > NEVER_HEARD_OF_S:
                    lost.append(f"rank {number} has never been heard of")
                continue
            place = self._read(number)
            sign = (place["beat"], place["phase"], place["step"])
            if number not in self._seen or self._seen[number][0] != sign:
                self._seen[number] = (sign, now, place)
            silent = now - self._seen[number][1]
            if silent > limit_s and place["phase"] != "done":
                lost.append(
                    f"rank {number} ({place['who']}) has not been heard of for {silent:.0f} s; it was {_doing(place)}"
                )
        return lost

    def _left(self) -> list[str]:
        """Sentences on the ranks that have ended, while this one has not."""
        places = {number: self._seen[number][2] for number in self._others() if number in self._seen}
        return [
            f"rank {number} ({place['who']}) has ended, at step {place['step']}"
            for number, place in places.items()
            if place["phase"] == "done"
        ]

    def _too_long(self) -> list[str]:
        """Sentences on the ranks that have been at one thing for longer than is likely."""
        lost = []
        for number in self._others():
            if number not in self._seen:
                continue
            place = self._seen[number][2]
            place_for = place["for"] + time.monotonic() - self._seen[number][1]
            limit = (
                max(self._shortest_limit_s, TIMES_SLOWEST * max(place["slowest"], self._slowest_step))
                if place["phase"] == "computing"
                else OTHER_PHASES_LIMIT_S
            )
            if place["phase"] not in UNLIMITED and place_for > limit:
                lost.append(
                    f"rank {number} ({place['who']}) has been {_doing(place)} for {place_for:.0f} s; the others wait "
                    "for it"
                )
        return lost

    def _others(self) -> list[int]:
        return [number for number in range(self._count) if number != self._number]

    def _error(self, what: str) -> UserError:
        whole = self.newest_checkpoint
        return UserError(
            what,
            next_step=f"{whole} is whole; the same command with `--resume` continues, with any number of processes"
            if whole
            else "there is no checkpoint yet; the same command starts again",
            exit_code=EXIT_RANK_LOST,
        )


def _doing(place: JsonObject) -> str:
    match place["phase"]:
        case "preparing":
            return "preparing"
        case "waiting":
            return f"waiting for others in step {place['step']}" if place["step"] else "waiting for others"
        case phase:
            return f"{phase} step {place['step']}"


def _end_process(error: UserError) -> None:
    sys.stderr.write(f"{error}\n")
    sys.stderr.flush()
    os._exit(error.exit_code)
