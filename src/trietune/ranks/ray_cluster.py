"""A Ray cluster: opened without its noise, and a mailbox through which workers and the command talk.

Ray is an extra, imported where it is asked for.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trietune.errors import UserError
from trietune.io.json_types import JsonObject

# What a worker needs of the environment that Ray does not hand on to nodes that run already.
HANDED_ON = ("HF_", "TRIETUNE_", "WANDB_")
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray ends workers when a machine's memory is nearly full, for others' sake; a run cuts smaller micro-batches.
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A training is no background work.
    "RAY_worker_niceness": "0",
}
OBJECT_STORE_BYTES = 128 * 2**20
ATTEMPTS = 3
REACHED_WITHIN_S = 10.0
TOO_SLOW = ("timed out during startup", "Failed to connect to GCS", "may not be complete yet before the timeout")


@contextmanager
def open_cluster(address: str | None, *, num_cpus: int | None = None) -> Iterator[Any]:
    """The module `ray`, connected to the cluster at `address`, or to one of this machine that ends with the block.

    Args:
        num_cpus: of a cluster of this machine; None: its cores.

    Raises:
        UserError: Ray is not installed, or there is no cluster at `address`.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "`--ray` needs the package `ray`, which is not installed", next_step="pip install 'trietune[ray]'"
        ) from error
    options: JsonObject = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if address is None:
        options |= {
            "address": "local",
            "num_cpus": num_cpus,
            # Nothing of it listens on the network.
            "_node_ip_address": "127.0.0.1",
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        _start(ray, options)
    else:
        handed_on = {name: value for name, value in os.environ.items() if name.startswith(HANDED_ON)}
        _connect(ray, {**options, "address": address, "runtime_env": {"env_vars": handed_on}})
    try:
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, options: JsonObject) -> None:
    address = str(options["address"])
    try:
        _reach(address)
        ray.init(**options)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster at `{address}`: {_told(error)}",
            next_step="`ray status --address ADDR` tells whether one runs there; without `--address`, one of this "
            "machine is started for the run",
        ) from error


def _reach(address: str) -> None:
    """Connect to `HOST:PORT` or `ray://HOST:PORT` once: where nobody listens, Ray 2.60 goes on trying without an end.

    Raises:
        OSError: nobody listens there, or there is no such host.
        OverflowError: no port has this number.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACHED_WITHIN_S).close()


def _start(ray: Any, options: JsonObject) -> None:
    """Start Ray here; again where the machine was too busy, since a raylet waits 15 s for its agents and then ends."""
    for attempt in range(ATTEMPTS):
        try:
            ray.init(**options)
        except Exception as error:  # a start that takes too long raises no more than that
            ray.shutdown()
            if attempt == ATTEMPTS - 1 or not any(part in str(error) for part in TOO_SLOW):
                raise UserError(
                    f"Ray does not start on this machine: {_told(error)}",
                    next_step="when the machine is less busy, try again; `--nproc N` starts processes without Ray",
                ) from error
        else:
            return


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class Mailbox:
    """An actor between the command and the workers: what they say, and whether they are asked to stop."""

    def __init__(self) -> None:
        self._items: list[tuple[str, object]] = []
        self._asked: str | None = None

    def put(self, kind: str, item: object) -> None:
        """Say something to the command."""
        self._items.append((kind, item))

    def take(self) -> list[tuple[str, object]]:
        """What has been said since the last call, in order."""
        taken, self._items = self._items, []
        return taken

    def ask_to_stop(self, signal_name: str) -> None:
        """Ask the workers to end after the step under way, as after this signal."""
        self._asked = signal_name

    def asked(self) -> str | None:
        """The signal by which workers are asked to stop, if they are."""
        return self._asked
