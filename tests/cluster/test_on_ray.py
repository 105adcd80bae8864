"""Studies on a cluster end as they end here: whatever is killed, removed or full on the way."""

import os
import signal
import threading
import time

import pytest
import ray
from nodes import node
from toys import Toy, begun

from vqlib.config import CalibrationConfig, VQConfig
from vqlib.models import pipeline
from vqlib.studies import engines
from vqlib.studies.engines import complete, run
from vqlib.studies.main_table import TableConfig, make_table
from vqlib.studies.on_ray import OnRay
from vqlib.studies.pipelined import calibrate_in_stages
from vqlib.studies.tasks import Needs, rows_of, under_way
from vqlib.system.fingerprint import fingerprint


@pytest.fixture
def place(cluster, monkeypatch):
    monkeypatch.setattr(engines, "PAUSE", 0.1)
    return OnRay()


def rows(folder, tasks):
    return [rows_of(folder).read(*task.made_of()) for task in tasks]


def squares(folder, tasks):
    return [row and row["square"] for row in rows(folder, tasks)]


def test_tasks_are_made_once_in_the_order_they_need_by_both_nodes(tmp_path, place):
    base = Toy(1, "slow")
    tasks = [Toy(n, "meets", before=(base,)) for n in range(2, 10)]  # a node's first worker may take seconds to begin
    told = list(run(tmp_path, tasks, place))
    assert told[-1].failures == ()
    assert squares(tmp_path, [base, *tasks]) == [n * n for n in range(1, 10)]
    assert told[1].task == base and all(begun(tmp_path, n) == 1 for n in range(1, 10))
    made_by = {row["pid"] for row in rows(tmp_path, tasks)}
    assert len(made_by) >= 2 and os.getpid() not in made_by
    assert ray.is_initialized() and place.device == "cpu"


def test_errors_are_told_and_a_full_disk_or_a_killed_worker_is_tried_again(tmp_path, place):
    tasks = [Toy(1, "error"), Toy(2, "full"), Toy(3, "killed"), Toy(4)]
    with pytest.raises(RuntimeError, match="toy 1: ValueError: 1 cannot be squared") as raised:
        complete(run(tmp_path, tasks, place))
    assert "1 tasks" in str(raised.value) and squares(tmp_path, tasks) == [None, 4, 9, 16]
    assert [begun(tmp_path, n) for n in (1, 2, 3, 4)] == [1, 2, 2, 1] and not under_way(tmp_path)


def test_a_task_that_kills_every_worker_is_given_up(tmp_path, place, monkeypatch):
    monkeypatch.setattr(engines, "ATTEMPTS", 2)
    with pytest.raises(RuntimeError, match="toy 1: lost 2 times, the last time by WorkerCrashedError"):
        complete(run(tmp_path, [Toy(1, "always killed")], place))


def test_a_node_that_is_removed_in_the_middle_loses_nothing(tmp_path, cluster, place):
    third = cluster.add_node(**node())
    tasks, lost = [Toy(n, "slow") for n in range(12)], []
    for progress in run(tmp_path, tasks, place):
        if progress.made == 4 and third:
            cluster.remove_node(third)
            third = None
        if progress.outcome and progress.outcome.state == "lost":
            lost.append(progress.outcome.error)
    assert squares(tmp_path, tasks) == [n * n for n in range(12)] and progress.made == 12
    assert len(lost) <= 2 and not progress.failures


def test_tasks_wait_for_what_they_say_they_need(tmp_path, place):
    """Two that need more than half of all memory never run side by side."""
    memory = int(ray.cluster_resources()["memory"])
    tasks = [Toy(n, "slow", needs=Needs(memory=int(0.3 * memory))) for n in range(4)]
    most, done = [], threading.Event()
    watcher = threading.Thread(
        target=lambda: [most.append(len(under_way(tmp_path))) or time.sleep(0.01) for _ in iter(done.is_set, True)]
    )
    watcher.start()
    complete(run(tmp_path, tasks, place))
    done.set()
    watcher.join()
    assert max(most) <= 2 and squares(tmp_path, tasks) == [0, 1, 4, 9]


SMALL = TableConfig(
    images=140, steps=1, iterations=2, hessian_batches=1, bootstrap=3, longer=(), methods=(("VQ4DiT", (2,)),)
)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return metrics(make_table(SMALL, tmp_path_factory.mktemp("here"), report=lambda line: None))


def metrics(table):
    return table.drop(columns=["minutes"])


def test_the_table_is_the_local_one_bit_for_bit_and_workers_may_be_killed(tmp_path, cluster, here):
    killed, done = [], threading.Event()

    def kill():
        while not done.wait(3.0) and len(killed) < 2:
            for one in under_way(tmp_path)[:1]:
                killed.append(one["where"])
                try:
                    os.kill(int(one["where"].split(":")[-1]), signal.SIGKILL)
                except ProcessLookupError:  # it ended just now
                    continue

    killer = threading.Thread(target=kill)
    killer.start()
    table = make_table(SMALL, tmp_path, on="ray", report=lambda line: None)
    done.set()
    killer.join()
    assert killed and metrics(table).equals(here)


def test_a_calibration_by_two_actors_is_one_process_bit_for_bit(cluster):
    pipe, vq = pipeline.load(), VQConfig(k=16, d=4, candidates=2, kmeans_iterations=2)
    config = CalibrationConfig(iterations=3, batch_size=2, steps=3)
    found = []
    for on in ("local", "ray"):
        calibration = calibrate_in_stages(pipe, vq, config, 2, on=on)
        records = [(r.block_losses, r.ratio_loss, r.layers) for r in calibration]
        found.append((records, fingerprint(calibration.finish())))
    assert found[0] == found[1]


def test_a_study_kept_in_a_store_is_whole_there(tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(engines, "PAUSE", 0.1)
    store = f"file://{tmp_path}/store"
    base, here, there = Toy(1), tmp_path / "here", tmp_path / "there"
    tasks = [Toy(n, "killed" if n == 3 else "", before=(base,)) for n in range(2, 6)]
    here.mkdir(), there.mkdir()
    complete(run(here, tasks, OnRay(store)))
    last = complete(run(there, tasks, OnRay(store)))  # another machine, whose folder is empty
    assert last.made == 4 and squares(there, tasks) == [4, 9, 16, 25]
    assert rows(there, tasks) == rows(here, tasks) and not begun(there, 2)
