"""`trietune train --nproc N`: one command becomes N processes on this machine, watched until the last one has ended.

No torch here, so it starts at once and stays small. `torchrun` does the same for several machines.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from trietune.errors import EXIT_DONE, EXIT_RANK_LOST, UserError
from trietune.ranks.launched import BEGAN, QUIET

# After a process has failed: the others get SIGTERM, and this long to end.
GRACE_S = 3.0
# After a failure that the others hear of from the one that failed, such as a mistake in the settings.
GRACE_AFTER_NEWS_S = 20.0
# After one has ended because another one is missing: how long that other one may take to end, too.
CAUSE_WITHIN_S = 2.0
POLL_S = 0.1
# Those that end a run with its work saved. (macOS has no PWR.)
FORWARDED = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGXCPU", "SIGPWR")
    if name in signal.Signals.__members__
)
# Those that a person or a scheduler sends once, and a second time if they mean it.
URGENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# What a process holds before it has read anything: Python, torch and transformers.
LIBRARY_BYTES = 300_000_000
# From <linux/prctl.h>.
PR_SET_PDEATHSIG = 1


def launch(
    command: Sequence[str], count: int, *, restarts: int = 0, began: float | None = None, say: Callable[[str], None]
) -> int:
    """Run `count` copies of a command as one training; returns the exit code of the whole.

    Args:
        command: program and arguments.
        restarts: how often a training that has lost a process begins again, with `--resume`.
        began: when the user's command began, as `time.monotonic` tells it, for `max_time`.
        say: told what happens, a line or two at a time.
    """
    attempt = 0
    command = list(command)
    _check_memory(count)
    while True:
        processes = Processes(command, count, began)
        with processes.forwarding_signals():
            end = processes.wait()
        if end is None:
            return EXIT_DONE
        is_lost = end.code < 0 or end.code == EXIT_RANK_LOST
        # A process that ends with this code has named another one: it is the messenger.
        was_stopped = processes.stopped_by is not None
        if end.code < 0 and not was_stopped:
            say(
                f"error: rank {end.number} of {count} (process {end.pid}) was killed by {signal_name(-end.code)}; "
                "the others were ended"
            )
        if was_stopped or not is_lost:
            return end.code if end.code >= 0 else 128 - end.code
        if attempt == restarts:
            # A messenger has said what comes next, too.
            if end.code < 0:
                say(
                    "next:  the same command with `--resume` resumes from the newest whole checkpoint, with any number "
                    "of processes"
                )
            return EXIT_RANK_LOST
        attempt += 1
        say(f"starting again from the newest whole checkpoint ({attempt} of {restarts})")
        if "--resume" not in command:
            command.append("--resume")


@dataclass(frozen=True, slots=True)
class Ended:
    """The first process that did not end well; `code` is negative after a signal."""

    number: int
    pid: int
    code: int


@dataclass(slots=True)
class Processes:
    """`count` copies of a command that know of each other, started.

    Attributes:
        stopped_by: the first signal that was handed on; None if there was none.
    """

    command: Sequence[str]
    count: int
    began: float | None = None
    stopped_by: signal.Signals | None = None
    _must_leave: bool = False
    _children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        port = free_port()
        for number in range(self.count):
            self._children.append(
                subprocess.Popen(  # noqa: S603  (our own command)
                    self.command,
                    env={**environment_of(number, self.count, port), **self._beginning()},
                    # Ctrl-C reaches only this process, which passes it on.
                    start_new_session=True,
                    preexec_fn=end_with_parent if sys.platform == "linux" else None,
                )
            )

    def wait(self) -> Ended | None:
        """Wait for all; when one fails, the others are ended. None if all ended well."""
        first: Ended | None = None
        deadline = None
        while any(child.poll() is None for child in self._children):
            time.sleep(POLL_S)
            first = first or self._failed()
            if self._must_leave and deadline is None:
                deadline = time.monotonic() + GRACE_S
            if first is not None and deadline is None and self.stopped_by is None:
                is_known = first.code > 0 and first.code != EXIT_RANK_LOST
                deadline = time.monotonic() + (GRACE_AFTER_NEWS_S if is_known else GRACE_S)
                if not is_known:
                    self.send(signal.SIGTERM)
            if deadline is not None and time.monotonic() > deadline:
                self.send(signal.SIGKILL)
        return first or self._failed()

    def send(self, number: signal.Signals) -> None:
        """A signal to all that are still there."""
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number)

    def stop(self, number: signal.Signals) -> None:
        """Hand a signal on, which stops all after the step under way; the second one of a person ends them soon.

        A process hears no signal while it waits for another one, so the second is not left to it.
        """
        if self.stopped_by is not None and number in URGENT:
            self._must_leave = True
        self.stopped_by = self.stopped_by or number
        self.send(number)

    def forwarding_signals(self) -> _Forwarding:
        """While open, signals to this process go to all; the processes stop after the step under way."""
        return _Forwarding(self)

    def _beginning(self) -> dict[str, str]:
        return {} if self.began is None else {BEGAN: repr(self.began)}

    def _failed(self) -> Ended | None:
        """The process that did not end well, if there is one."""
        first = self._first_failed()
        return None if first is None else self._cause(first)

    def _cause(self, first: Ended) -> Ended:
        """The process that failed by itself, if `first` only misses it: it may be slower to end than to be missed."""
        deadline = time.monotonic() + CAUSE_WITHIN_S
        while first.code == EXIT_RANK_LOST:
            codes = [child.poll() for child in self._children]
            for number, code in enumerate(codes):
                if code not in (None, 0, EXIT_RANK_LOST):
                    return Ended(number, self._children[number].pid, code)
            if None not in codes or time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        return first

    def _first_failed(self) -> Ended | None:
        for number, child in enumerate(self._children):
            if child.poll() not in (None, 0):
                return Ended(number, child.pid, child.returncode)
        return None


class _Forwarding:
    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._before = {}  # type: ignore[var-annotated]  # whatever `signal` returns

    def __enter__(self) -> None:
        for number in FORWARDED:
            # One that is ignored stays ignored, as `nohup` wants it of HUP.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._forward)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._processes.stop(signal.Signals(number))


def environment_of(number: int, count: int, port: int, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What one of `count` processes on this machine finds in its environment."""
    threads = str(max((os.cpu_count() or 1) // count, 1))
    return {
        # Set by hand, the number of threads stays.
        "OMP_NUM_THREADS": threads,
        **QUIET,
        **environ,
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@contextmanager
def as_one_of(count: int) -> Iterator[None]:
    """While open, this process finds what one of `count` would: a share of memory and of threads."""
    changed = {} if count == 1 else {k: v for k, v in environment_of(0, count, 0).items() if os.environ.get(k) != v}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check_memory(count: int) -> None:
    """Refuse processes whose libraries would fill the memory of this machine, before any is started.

    Raises:
        UserError: there are too many.
    """
    import psutil

    free = psutil.virtual_memory().available
    if count * LIBRARY_BYTES > free:
        raise UserError(
            f"{count:,} processes need {count * LIBRARY_BYTES / 1e9:,.0f} GB for their libraries, and "
            f"{free / 1e9:.1f} GB of memory are free",
            next_step=f"`--nproc {max(os.cpu_count() or 1, 1)}` is one for each core",
        )


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def signal_name(number: int) -> str:
    """`SIGKILL`, or `signal 77` for one that has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies, so that no process trains on unattended; Linux only."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
