"""Whoever makes the attempts: every task once, in the order that they need; what is lost is tried again, errors are told."""

import dataclasses
import os
import subprocess
import sys
import threading
import time

import pytest
from filelock import FileLock
from toys import Toy, begun

from vqlib.studies import engines
from vqlib.studies.engines import complete, run
from vqlib.studies.on_ray import engine
from vqlib.studies.processes import Here, Processes
from vqlib.studies.tasks import key_of, rows_of, under_way


class Kept(Processes):
    """Processes that serve the next test, too: starting one takes seconds."""

    def close(self):
        for process in self._busy.values():
            process.stop()
        self._busy = {}


@pytest.fixture(scope="module")
def processes():
    kept = Kept(2)
    yield kept
    Processes.close(kept)


@pytest.fixture(params=["here", "processes"])
def place(request, processes):
    return Here() if request.param == "here" else processes


def squares(folder, tasks):
    found = [rows_of(folder).read(*task.made_of()) for task in tasks]
    return [row and row["square"] for row in found]


def test_tasks_are_made_once_whoever_made_them(tmp_path, place):
    tasks = [Toy(n) for n in (3, 1, 2, 1)]
    complete(run(tmp_path, tasks[:1], Here()))
    told = list(run(tmp_path, tasks, place))
    assert squares(tmp_path, tasks) == [9, 1, 4, 1] and all(begun(tmp_path, n) == 1 for n in (1, 2, 3))
    assert (told[0].wanted, told[0].there, told[0].made, told[0].left) == (4, 1, 0, None)
    assert (told[-1].there, told[-1].made, told[-1].left, told[-1].failures) == (1, 3, 0.0, ())
    assert str(told[-1]) == "4 of 4 rows, about 0 min left"
    assert not under_way(tmp_path) and list(run(tmp_path, tasks, Here()))[-1].there == 4


def test_what_a_task_comes_after_is_made_before_it_and_once(tmp_path, place):
    base = Toy(1, "slow")
    middle = [Toy(2, before=(base,)), Toy(3, before=(base,))]
    last = Toy(4, before=tuple(middle))
    told = list(run(tmp_path, [last, middle[0]], place))
    order = [progress.task.n for progress in told if progress.task]
    assert order[0] == 1 and order[-1] == 4 and sorted(order) == [1, 2, 3, 4]
    assert told[-1].wanted == told[-1].made == 2  # the others were not asked for
    assert [begun(tmp_path, n) for n in (1, 2, 3, 4)] == [1, 1, 1, 1]


def test_a_task_that_fails_is_told_with_its_error_and_only_what_follows_it_is_left_out(tmp_path, place):
    bad = Toy(1, "error")
    tasks = [bad, Toy(2), Toy(3, before=(bad,)), Toy(4, before=(Toy(5, before=(bad,)),)), Toy(6)]
    with pytest.raises(RuntimeError, match="4 tasks of .* failed, the others are made:\n") as raised:
        complete(run(tmp_path, tasks, place))
    assert "toy 1: ValueError: 1 cannot be squared (layer 3) (toys.py, line " in str(raised.value)
    assert "toy 3: toy 1, which it comes after, has failed" in str(raised.value)
    assert squares(tmp_path, tasks) == [None, 4, None, None, 36] and begun(tmp_path, 1) == 1


def test_a_full_disk_is_tried_again(tmp_path, place, monkeypatch):
    monkeypatch.setattr(engines, "PAUSE", 0.01)
    tasks = [Toy(1, "full"), Toy(2)]
    assert complete(run(tmp_path, tasks, place)).made == 2
    assert squares(tmp_path, tasks) == [1, 4] and begun(tmp_path, 1) == 2 and begun(tmp_path, 2) == 1


def test_a_killed_process_loses_its_own_attempt_only_and_is_replaced(tmp_path, processes):
    tasks = [Toy(1, "killed"), *(Toy(n, "slow") for n in (2, 3, 4))]
    told = list(run(tmp_path, tasks, processes))
    assert squares(tmp_path, tasks) == [1, 4, 9, 16]
    assert [begun(tmp_path, n) for n in (1, 2, 3, 4)] == [2, 1, 1, 1]
    lost = [progress.outcome for progress in told if progress.outcome and progress.outcome.state == "lost"]
    assert len(lost) == 1 and "exit code -9" in lost[0].error and not under_way(tmp_path)


def test_a_task_that_kills_every_process_is_given_up(tmp_path, processes, monkeypatch):
    monkeypatch.setattr(engines, "ATTEMPTS", 2)
    monkeypatch.setattr(engines, "PAUSE", 0.01)
    with pytest.raises(RuntimeError, match="toy 1: lost 2 times, the last time by the end of its process"):
        complete(run(tmp_path, [Toy(1, "always killed"), Toy(2)], processes))
    assert begun(tmp_path, 1) == 2 and squares(tmp_path, [Toy(2)]) == [4]


def test_a_study_that_was_killed_as_a_whole_is_not_told_as_under_way(tmp_path):
    code = "import sys; from toys import Toy; from vqlib.studies import engines, processes; from pathlib import Path\n"
    code += "list(engines.run(Path(sys.argv[1]), [Toy(1, 'always killed')], processes.Here()))"
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], env=os.environ | {"PYTHONPATH": ":".join(sys.path)})
    assert ended.returncode == -9 and [path.stem for path in (tmp_path / "running").iterdir()] == [key_of(Toy(1))]
    assert not under_way(tmp_path) and not list((tmp_path / "running").iterdir())


def test_what_another_process_makes_is_left_to_it_and_waited_for_at_the_end(tmp_path):
    tasks = [Toy(1), Toy(2)]
    path = rows_of(tmp_path).path(*tasks[0].made_of())
    path.parent.mkdir(parents=True)
    held = threading.Event()

    def other():
        with FileLock(path.with_suffix(".lock")):
            held.set()
            time.sleep(1.0)

    threading.Thread(target=other).start()
    held.wait()
    started = time.monotonic()
    told = list(run(tmp_path, tasks, Here()))
    assert [progress.outcome.state for progress in told if progress.outcome] == ["taken", "made", "made"]
    assert time.monotonic() - started > 0.8 and told[-1].made == 2


def test_progress_says_what_runs_where(tmp_path, processes):
    watched, seen = run(tmp_path, [Toy(1, "slow"), Toy(2, "slow")], processes), []
    first = next(watched)
    thread = threading.Thread(target=lambda: list(watched))
    thread.start()
    while thread.is_alive():
        seen += first.running()
        time.sleep(0.02)
    assert any(line.startswith("toy 1 on ") for line in seen) and first.running() == []


def test_stopping_stops_the_processes(tmp_path, processes):
    watched = run(tmp_path, [Toy(n, "slow") for n in range(20)], processes)
    busy = []
    while not busy:  # both may have ended at one moment
        next(watched)
        busy = [one.process for one in processes._busy.values()]
    watched.close()
    assert not any(process.is_alive() for process in busy) and not under_way(tmp_path)


def test_results_that_do_not_arrive_in_the_folder_are_told(tmp_path):
    class Elsewhere(Here):
        def ended(self):
            folder, task, wait = self._next
            return [engines.Outcome(key_of(task), "made", "node-2:7")]

    with pytest.raises(RuntimeError, match="node-2:7 says it is there, but it is not in .*: is that folder shared?"):
        complete(run(tmp_path, [Toy(1)], Elsewhere()))


def test_engines_by_name_and_what_is_refused(tmp_path):
    assert isinstance(engine(), Here) and isinstance(engine("local", 3), Processes)
    with pytest.raises(ValueError, match="on='slurm' is not one of local, ray"):
        engine("slurm")
    with pytest.raises(ValueError, match="workers=0 must be at least 1"):
        Processes(0)
    with pytest.raises(ValueError, match="gone through twice: give a list, not a generator"):
        next(run(tmp_path, (Toy(n) for n in range(2)), Here()))
    assert dataclasses.replace(Toy(1), cost=2.0).made_of() == Toy(1).made_of()


def test_without_ray_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"need Ray: pip install 'vqlib\[cluster\]'"):
        engine("ray")


def test_a_store_is_for_machines_that_share_nothing():
    with pytest.raises(ValueError, match="store='s3://bucket' is for on='ray'"):
        engine("local", store="s3://bucket")
