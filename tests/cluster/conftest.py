"""A cluster of two nodes of one core each on this machine: real processes, one for the whole session."""

import os
import socket
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

TESTS = Path(__file__).resolve().parents[1]
ADDRESS = "127.0.0.2"  # loopback, but not one that Ray takes for "this machine" and replaces by an outer address
AGENTS = "metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port"


def node():
    """Arguments of a node. A port that it is told it need not wait for: its agents take long to begin on a busy machine."""
    sockets = [socket.socket() for _ in AGENTS]
    for one in sockets:
        one.bind((ADDRESS, 0))
    ports = dict(zip(AGENTS, (one.getsockname()[1] for one in sockets), strict=True))
    for one in sockets:
        one.close()
    small = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    return small | {"node_ip_address": ADDRESS} | ports


@pytest.fixture(scope="session")
def cluster():
    places = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]  # where workers find vqlib and the toys
    os.environ.update({"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"})
    torch.set_num_threads(1)  # as the workers have
    nodes = Cluster(initialize_head=True, head_node_args=node())
    nodes.add_node(**node())
    ray.init(address=nodes.address, log_to_driver=False, _node_ip_address=ADDRESS)
    nodes.wait_for_nodes()
    yield nodes
    ray.shutdown()
    nodes.shutdown()
