"""A cluster of three nodes on this machine, and a training on it that loses one; started with Ray's Python.

nodes.py NAME FOLDER LOSE_AT COMMAND...    the node that holds a worker is lost when the run has logged LOSE_AT steps
"""

import subprocess
import sys
import time
from pathlib import Path

from ray._private import services
from ray._private.node import Node
from ray.cluster_utils import Cluster

LIMIT_S = 500
# Ray gives a node 30 s to start, whatever else its machine does.
STARTS_WITHIN_S = 300


def wait_for_nodes() -> None:
    """Have Ray wait for as long as it takes."""
    get_node = services.get_node

    def wait(*arguments: object) -> object:
        end = time.monotonic() + STARTS_WITHIN_S
        while True:
            try:
                return get_node(*arguments)
            except RuntimeError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)

    services.get_node = wait


def lose(cluster: Cluster, node: Node) -> None:
    """Kill a node with all that runs on it, as when its machine goes."""
    cluster.remove_node(node, allow_graceful=False)
    print("a node is lost", file=sys.stderr, flush=True)


def main() -> int:
    metrics, lose_at, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    memory = 80 * 2**20
    wait_for_nodes()
    # The command connects to the node of its own address, the head, and so outlives the one that is lost.
    head = {"num_cpus": 0, "object_store_memory": memory, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [
        cluster.add_node(num_cpus=1, object_store_memory=memory, node_ip_address=f"127.0.0.{number}")
        for number in (2, 3)
    ]
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
