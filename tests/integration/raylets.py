"""A Ray cluster of several nodes on this machine, until stdin ends: `raylets.py '{"name": {…}}'`.

The first node is the head. Prints {"address": …, "raylets": {name: process id}} once all are there.
"""

import json
import sys

from ray.cluster_utils import Cluster

LOST_SOON = {  # a node that is gone is taken for lost after five seconds, a slow one after minutes
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 10,
}


def main(nodes: dict[str, dict]) -> None:
    cluster, started = Cluster(), {}
    for name, options in nodes.items():
        head = {} if started else {"_system_config": LOST_SOON, "include_dashboard": False}
        started[name] = cluster.add_node(**options, **head)
    pids = {n: node.all_processes["raylet"][0].process.pid for n, node in started.items()}
    print(json.dumps({"address": cluster.address, "raylets": pids}), flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
