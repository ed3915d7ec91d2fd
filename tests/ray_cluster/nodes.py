"""A cluster of three nodes on this machine, and a training on it that loses one; started with Ray's Python.

nodes.py METRICS LOSE_AT COMMAND...    a node that holds a worker is lost when METRICS holds so many logged steps
"""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ray._private.node import Node
from ray.cluster_utils import Cluster

T = TypeVar("T")
LIMIT_S = 900
# A raylet that waits for its agents for longer than 15 s ends itself, which happens on a machine that is busy.
ATTEMPTS = 6


def started(start: Callable[[], T]) -> T:
    """A node, or a cluster of one, started again where a raylet was too slow."""
    for _ in range(ATTEMPTS - 1):
        try:
            return start()
        except Exception as error:  # Ray raises no other one
            print(f"starting again: {' '.join(str(error).split())[:100]}", file=sys.stderr, flush=True)
    return start()


def ports() -> dict[str, int]:
    """Free ports, so that a raylet waits for as few agents as possible."""
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return {name: one.getsockname()[1] for name, one in zip(names, sockets, strict=True)}


def lose(cluster: Cluster, node: Node) -> None:
    """Kill a node with all that runs on it, as when its machine goes."""
    cluster.remove_node(node, allow_graceful=False)
    print("a node is lost", file=sys.stderr, flush=True)


def main() -> int:
    metrics, lose_at, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    memory = 80 * 2**20
    # The command connects to the node of its own address, the head, and so outlives the one that is lost. Not
    # 127.0.0.1: Ray takes the machine's address where it is asked to connect to that.
    head = {"num_cpus": 0, "object_store_memory": memory, "include_dashboard": False}
    cluster = started(lambda: Cluster(initialize_head=True, head_node_args={**head, **ports()}))

    def add(address: str) -> Node:
        return cluster.add_node(num_cpus=1, object_store_memory=memory, node_ip_address=address, **ports())

    nodes = [started(lambda address=address: add(address)) for address in ("127.0.0.2", "127.0.0.3")]
    try:
        child = subprocess.Popen([*command, "--address", cluster.address])
        end = time.monotonic() + LIMIT_S
        while child.poll() is None and time.monotonic() < end:
            if len(nodes) == 2 and metrics.is_file() and metrics.read_text().count('"event": "step"') >= lose_at:
                lose(cluster, nodes.pop())
            time.sleep(0.2)
        if child.poll() is None:
            child.kill()
            return 99
        return child.returncode
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main())
