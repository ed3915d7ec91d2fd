"""A cluster of three nodes on this machine, and a training on it that loses one; started with Ray's Python.

nodes.py NAME FOLDER LOSE_AT COMMAND...    the node that holds a worker is lost when the run has logged LOSE_AT steps
"""

import subprocess
import sys
import time
from pathlib import Path

from ray.cluster_utils import Cluster

LIMIT_S = 500


def main() -> int:
    metrics, lose_at, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    memory = 80 * 2**20
    # The command connects to the node that has its own address, which is the head, and so outlives the one that is lost.
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
                cluster.remove_node(nodes.pop(), allow_graceful=False)
                print("a node is lost", file=sys.stderr, flush=True)
            time.sleep(0.2)
        if child.poll() is None:
            child.kill()
            return 99
        return child.returncode
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main())
