"""Four processes that stay for a whole test session, since importing torch and transformers takes seconds in each.

pool.run(2, jobs.train_family, "gemma")      two of them are one training; what each returned, in order of rank
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

SIZE = 4
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SECONDS = 240


class Pool:
    def __init__(self, size: int = SIZE) -> None:
        context = multiprocessing.get_context("spawn")
        self.connections: list[Connection] = []
        self.processes = []
        before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        os.environ.update(dict.fromkeys(before, "1"))
        for _ in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            self.connections.append(here)
            self.processes.append(process)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

    def run(self, count: int, job: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
        """What `job` returned on each of `count` ranks; raises what it raised on the first rank that failed."""
        assert count <= len(self.connections), f"the pool has {len(self.connections)} processes"
        port = free_port()
        for number, connection in enumerate(self.connections[:count]):
            environment = {
                "RANK": number, "WORLD_SIZE": count, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": count,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                **{name: os.environ[name] for name in ("TRIETUNE_CACHE",) if name in os.environ},
            }  # fmt: skip
            connection.send(({name: str(value) for name, value in environment.items()}, job, arguments, named))
        results = []
        for number, connection in enumerate(self.connections[:count]):
            assert connection.poll(SECONDS), f"rank {number} of {count} does not answer"
            results.append(connection.recv())
        failures = [text for is_done, text in results if not is_done]
        assert not failures, "\n".join(failures)
        return [value for _, value in results]

    def close(self) -> None:
        for connection in self.connections:
            connection.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _serve(connection: Connection) -> None:
    while (order := connection.recv()) is not None:
        environment, job, arguments, named = order
        os.environ.update(environment)
        try:
            connection.send((True, job(*arguments, **named)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        finally:
            for name in LAUNCHER:
                os.environ.pop(name, None)
