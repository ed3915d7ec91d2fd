"""Meet the other processes: the store that keeps them together, and the group over it, within a time that ends.

torch waits for a process that never comes as long as for a step, in C++, where no signal is heard. So the waiting is
done by a thread, while the main thread says what it waits for and leaves when it is asked to.
"""

from __future__ import annotations

import datetime
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # it has no other home
from torch.distributed.rendezvous import rendezvous

from trietune.errors import EXIT_RANK_LOST, UserError
from trietune.ranks.launched import Launched

T = TypeVar("T")
# As long as torchrun waits for its machines.
MEET_WITHIN_S = 600.0
SAID_AFTER_S = 30.0
POLL_S = 0.1


def meet(launched: Launched, host: str, port: int, *, check: Callable[[], None]) -> Store:
    """The store of all processes, once all have come to it.

    Args:
        host, port: where rank 0, or torchrun, keeps the store.
        check: called while others are waited for; raises to leave.

    Raises:
        UserError: not all came in time, the address cannot be reached, or its port is taken.
    """

    def open_store() -> Store:
        store: Store = next(
            rendezvous("env://", launched.number, launched.count, timeout=datetime.timedelta(seconds=MEET_WITHIN_S))
        )[0]
        return store

    me = f"rank {launched.number} of {launched.count}"
    try:
        return waited_for(open_store, f"{me} waits for the other processes at {host}:{port}", check=check)
    except (RuntimeError, ValueError) as error:  # DistNetworkError and DistStoreError are RuntimeErrors
        told = _first_line(error)
        if "EADDRINUSE" in told:
            what, remedy = f"port {port} of this machine is taken", "the same command with another port"
        else:
            what = f"{me} did not meet the other processes at {host}:{port} within {MEET_WITHIN_S:.0f} s"
            remedy = "start all processes at about the same time; MASTER_ADDR and MASTER_PORT name a port of rank 0's "
            remedy += "machine that the others reach"
        raise UserError(what, where=told, next_step=remedy, exit_code=EXIT_RANK_LOST) from error


def connect(
    launched: Launched, backend: str, store: Store, timeout: datetime.timedelta, *, check: Callable[[], None]
) -> None:
    """Connect the processes that have met, each with each.

    Raises:
        UserError: there is no way from one to another.
    """

    def open_group() -> None:
        dist.init_process_group(backend, store=store, rank=launched.number, world_size=launched.count, timeout=timeout)

    me = f"rank {launched.number} of {launched.count}"
    try:
        waited_for(open_group, f"{me} waits for a connection to each of the others", check=check)
    except RuntimeError as error:
        raise UserError(
            f"{me} cannot be connected to the others",
            where=_first_line(error),
            next_step="GLOO_SOCKET_IFNAME=NAME (and NCCL_SOCKET_IFNAME) name the network card that reaches them; "
            "`ip address` lists the cards",
            exit_code=EXIT_RANK_LOST,
        ) from error


def waited_for(function: Callable[[], T], sentence: str, *, check: Callable[[], None]) -> T:
    """What `function` gives in a thread of its own; after some time, `sentence` says what is waited for."""
    found: list[T] = []
    raised: list[BaseException] = []

    def call() -> None:
        try:
            found.append(function())
        except BaseException as error:  # it is raised where it is waited for
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True, name="trietune-meet")
    thread.start()
    began = time.monotonic()
    is_said = False
    while thread.is_alive():
        thread.join(POLL_S)
        check()
        if not is_said and time.monotonic() - began > SAID_AFTER_S:
            is_said = True
            sys.stderr.write(f"{sentence}\n")
            sys.stderr.flush()
    if raised:
        raise raised[0]
    return found[0]


def _first_line(error: BaseException) -> str:
    """What torch says, without the C++ trace that may follow."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[0].split())[:300]
