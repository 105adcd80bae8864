"""A cluster of two nodes of one core each on this machine: real processes. For the tests here and for benchmarks/bench_studies.py."""

import os
import socket
from contextlib import contextmanager

import ray
import torch
from ray.cluster_utils import Cluster

ADDRESS = "127.0.0.2"  # loopback, but not one that Ray takes for "this machine" and replaces by an outer address
AGENTS = "metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port"


def node():
    """Arguments of a node. A port that is told need not be waited for: Ray's agents take long to begin on a busy machine."""
    sockets = [socket.socket() for _ in AGENTS]
    for one in sockets:
        one.bind((ADDRESS, 0))
    ports = dict(zip(AGENTS, (one.getsockname()[1] for one in sockets), strict=True))
    for one in sockets:
        one.close()
    small = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    return small | {"node_ip_address": ADDRESS} | ports


@contextmanager
def two_nodes():
    """The cluster, joined by this process, which then computes on one thread as its workers do."""
    os.environ.update(OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0")
    torch.set_num_threads(1)
    cluster = Cluster(initialize_head=True, head_node_args=node())
    cluster.add_node(**node())
    ray.init(address=cluster.address, log_to_driver=False, _node_ip_address=ADDRESS)
    cluster.wait_for_nodes()
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
