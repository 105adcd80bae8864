"""The same studies on a Ray cluster (extra `cluster`), or where there is none on one that is begun on this machine.

Every task is a Ray task of its own with the cores, GPUs and memory that it says it needs; it goes wherever they are free.
All that is known of results is in the study's folder: a file system that the machines share or, with a `store`, a folder of each.
"""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path

import torch

from vqlib.studies.engines import Engine
from vqlib.studies.processes import Here, Processes
from vqlib.studies.store import Store
from vqlib.studies.tasks import Needs, Outcome, Task, attempt, key_of
from vqlib.system.memory import device_label

PLACES = ("local", "ray")


def engine(on: str = "local", workers: int = 1, store: str = "") -> Engine:
    """The engine of that name. "local": this process, or as many others as `workers` says; "ray": RAY_ADDRESS or this machine.

    store: URL where a cluster without a shared file system keeps the study (see `Store`); processes of one machine need none.
    Raises ValueError for another name and for a store that is not used, ModuleNotFoundError saying what to install where Ray is not there.
    """
    if on not in PLACES:
        raise ValueError(f"on={on!r} is not one of {', '.join(PLACES)}")
    if on == "ray":
        return OnRay(store)
    if store:
        raise ValueError(f"store={store!r} is for on='ray': one machine has its folder")
    return Here() if workers <= 1 else Processes(workers)


def ray_module():
    """Ray; ModuleNotFoundError says how it is installed."""
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError:
        raise ModuleNotFoundError("studies on a cluster need Ray: pip install 'vqlib[cluster]'") from None


def join() -> bool:
    """Join the cluster that RAY_ADDRESS names, or begin one on this machine alone; whether it was not joined before."""
    ray = ray_module()
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unasked
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:
        ray.init(log_to_driver=False, include_dashboard=False, _node_ip_address="127.0.0.1")
    return True


class OnRay:
    """Attempts as Ray tasks. A cluster that is joined already is used and left as it is, another one left at the end."""

    room = 1000  # with Ray at a time: enough for it to plan and an autoscaler to see, few enough to keep no list

    def __init__(self, store: str = "") -> None:
        self._ray, self._store = ray_module(), Store(store) if store else None
        self._own = join()
        self._attempt = self._ray.remote(max_retries=0)(_attempt)  # the loop tries again, and counts
        self._looked_at: set[Needs] = set()
        self._tasks: dict = {}  # Ray's reference to an outcome -> folder, task

    @property
    def device(self) -> str:
        """What the cluster's workers compute on, as `device_label` has it; the GPU's name where there is one."""
        if not self._ray.cluster_resources().get("GPU"):
            return "cpu"
        return self._ray.get(self._ray.remote(num_gpus=0.01)(_gpu).remote())

    def start(self, folder: Path, task: Task, wait: bool) -> None:
        self._warn(task)
        options = demands(task.needs) | {"name": str(task)}
        reference = self._attempt.options(**options).remote(folder, task, wait, self._store)
        self._tasks[reference] = folder, task

    def ended(self) -> list[Outcome]:
        waiting = list(self._tasks)
        self._ray.wait(waiting, num_returns=1)
        ended, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0)
        return [self._outcome(reference) for reference in ended]

    def close(self) -> None:
        for reference in self._tasks:
            self._ray.cancel(reference, force=True)
        self._tasks = {}
        if self._own and self._ray.is_initialized():
            self._ray.shutdown()

    def _warn(self, task: Task) -> None:
        """Say once that no machine of the cluster, as it is now, has what a task needs."""
        needs = task.needs
        if needs in self._looked_at:
            return
        self._looked_at.add(needs)
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        wanted = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": needs.memory}
        if any(all(node.get(name, 0) >= value for name, value in wanted.items()) for node in nodes):
            return
        told = f"{task} needs {needs.cpus} cores, {needs.gpus:g} GPUs and {needs.memory / 2**30:.1f} GiB"
        warnings.warn(f"{told}; no machine of the cluster has as much: it waits for one that has", stacklevel=2)

    def _outcome(self, reference) -> Outcome:
        folder, task = self._tasks.pop(reference)
        key = key_of(task)
        try:
            outcome = self._ray.get(reference)
            if self._store and outcome.state in ("made", "there"):
                self._store.fetch_row(folder, task)
            return outcome
        except OSError as error:
            return Outcome(key, "lost", error=f"the store: {type(error).__name__}: {error}")
        except (self._ray.exceptions.RayTaskError, self._ray.exceptions.TaskUnschedulableError) as error:
            return Outcome(key, "failed", error=_last_line(error))  # not the task's own error: those are outcomes
        except self._ray.exceptions.RayError as error:  # worker or node gone, out of memory
            return Outcome(key, "lost", error=f"{type(error).__name__}: {_last_line(error)}")


def demands(needs: Needs) -> dict:
    """Options of a Ray task or actor."""
    return {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "memory": needs.memory or None}


def _attempt(folder: Path, task: Task, wait: bool, store: Store | None) -> Outcome:
    """On a worker of the cluster."""
    torch.set_num_threads(task.needs.cpus)
    return (store.attempt if store else attempt)(folder, task, wait)


def _gpu() -> str:
    return device_label("cuda")


def _last_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()[::-1]), type(error).__name__)
