"""One loop over a study's tasks, whoever makes the attempts: this process, processes of this machine, or a cluster.

The loop holds the tasks that may run now and those that wait for them, never the whole list; a worker is given one task
at a time. What was lost with a worker is tried again, what fails for its own reason is told at the end, the rest goes on.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vqlib.studies.tasks import Outcome, Task, forget, key_of, rows_of, under_way

ATTEMPTS = 10  # at one task that is lost again and again
PAUSE = 1.0  # seconds before a lost task is tried again where nothing else is to be done


class Engine(Protocol):
    """A place that makes attempts; `room` is how many may be with it at a time."""

    room: int

    def start(self, folder: Path, task: Task, wait: bool) -> None:
        """Have an attempt made, now or later."""

    def ended(self) -> list[Outcome]:
        """Outcomes that were not given yet; waits for one, and knows of at least one."""

    def close(self) -> None:
        """Stop everything that this engine has begun."""


@dataclass(frozen=True)
class Progress:
    """How far a study is. `outcome`, of `task`, is what was heard last; `left`: seconds by the tasks' costs."""

    folder: Path
    wanted: int
    there: int  # made before
    made: int
    failures: tuple[tuple[Task, str], ...]  # with their errors
    seconds: float
    left: float | None
    task: Task | None = None
    outcome: Outcome | None = None

    def __str__(self) -> str:
        failed = f", {len(self.failures)} failed" if self.failures else ""
        left = "" if self.left is None else f", about {self.left / 60:.0f} min left"
        return f"{self.there + self.made} of {self.wanted} rows{failed}{left}"

    def running(self) -> list[str]:
        """What is being made now and where, longest first."""
        now = time.time()
        return [f"{one['task']} on {one['where']}, {now - one['since']:.0f} s" for one in under_way(self.folder)]


def run(folder: str | Path, tasks: Iterable[Task], engine: Engine) -> Iterator[Progress]:
    """Make all of `tasks`, and what they come after, that are not in `folder`; Progress first, after every attempt, and at the end.

    `tasks` is gone through twice, to count and to work, and is never kept. Closing the iterator stops the engine.
    """
    folder = Path(folder).expanduser().absolute()
    if iter(tasks) is tasks:
        raise ValueError(f"the tasks are gone through twice: give a list, not a {type(tasks).__name__}")
    work = _Work(folder, tasks, engine)
    try:
        yield work.progress()
        while work.goes_on():
            for outcome in engine.ended():
                yield work.progress(work.conclude(outcome), outcome)
        yield work.progress()  # with those that were made for others, or asked for twice
    finally:
        engine.close()
        for key in work.under_way:
            forget(folder, key)


def complete(progress: Iterable[Progress]) -> Progress:
    """Run to the end. Raises RuntimeError naming what failed, once all else is made."""
    last = deque(progress, maxlen=1)[0]
    if last.failures:
        told = "\n".join(f"  {task}: {error}" for task, error in last.failures)
        raise RuntimeError(f"{len(last.failures)} tasks of {last.folder} failed, the others are made:\n{told}")
    return last


class _Work:
    """A study on its way: what is ready, what waits for what, how often something was lost."""

    def __init__(self, folder: Path, tasks: Iterable[Task], engine: Engine) -> None:
        self.folder, self.engine, self.rows = folder, engine, rows_of(folder)
        self.started, self.wanted, self.there, self.cost = time.monotonic(), 0, 0, 0.0
        present = self.rows.keys()  # where there is none, no task need be hashed to be counted
        for task in tasks:
            self.wanted += 1
            known = bool(present) and key_of(task) in present and self.rows.read(*task.made_of()) is not None
            self.there, self.cost = self.there + known, self.cost + (0.0 if known else task.cost)
        self.tasks = iter(tasks)
        self.states: dict[str, str] = {}  # of all tasks heard of: "open", "there", "made", "failed"
        self.ready: deque[Task] = deque()
        self.waiting: dict[str, tuple[Task, set[str]]] = {}  # tasks and the keys they come after
        self.under_way: dict[str, Task] = {}
        self.taken: deque[Task] = deque()
        self.own: dict[str, int] = {}  # open tasks of the list itself, and how often it has them
        self.losses, self.failures = Counter(), []
        self.found, self.made, self.spent, self.lost_last = 0, 0, 0.0, False

    def progress(self, task: Task | None = None, outcome: Outcome | None = None) -> Progress:
        seconds = time.monotonic() - self.started
        left = seconds * (self.cost - self.spent) / self.spent if self.spent else None
        failures = tuple(self.failures)
        return Progress(self.folder, self.wanted, self.there, self.made, failures, seconds, left, task, outcome)

    def goes_on(self) -> bool:
        """Start what there is room for; whether anything is under way."""
        while len(self.under_way) < self.engine.room:
            wait = False
            while not self.ready and (task := next(self.tasks, None)) is not None:
                self._line_up(task, own=True)
            if not self.ready:
                if self.under_way or not self.taken:
                    break
                self.ready, self.taken, wait = self.taken, deque(), True  # nothing is left but what others have
            elif self.lost_last and not self.under_way:
                time.sleep(PAUSE)
            task = self.ready.popleft()
            self.under_way[key_of(task)] = task
            self.engine.start(self.folder, task, wait)
        return bool(self.under_way)

    def conclude(self, outcome: Outcome) -> Task:
        """Take note of an attempt; returns its task."""
        task, key = self.under_way.pop(outcome.key), outcome.key
        self.lost_last = outcome.state == "lost"
        if outcome.state in ("made", "there") and self.rows.read(*task.made_of()) is None:
            shared = f"{outcome.where} says it is there, but it is not in {self.folder}: is that folder shared?"
            self._fail(task, key, shared)
        elif outcome.state in ("made", "there"):
            self._end(key, "made", task)
            for other in [k for k, (_, keys) in self.waiting.items() if key in keys]:
                self.waiting[other][1].discard(key)
                if not self.waiting[other][1]:
                    self.ready.appendleft(self.waiting.pop(other)[0])  # what is begun is finished first
        elif outcome.state == "taken":
            self.taken.append(task)
        elif outcome.state == "lost":
            forget(self.folder, key)
            self.losses[key] += 1
            if self.losses[key] < ATTEMPTS:
                self.ready.append(task)
            else:
                self._fail(task, key, f"lost {ATTEMPTS} times, the last time by {outcome.error}")
        else:
            self._fail(task, key, outcome.error)
        return task

    def _line_up(self, task: Task, own: bool = False) -> str:
        """Have a task wait for its turn, what it comes after before it; unless it is there or in line. Its key."""
        key = key_of(task)
        if key not in self.states:
            self.states[key] = "there" if self.rows.read(*task.made_of()) is not None else "open"
            if self.states[key] == "open":
                before = {self._line_up(other): other for other in task.after()}
                failed = [other for k, other in before.items() if self.states[k] == "failed"]
                missing = {k for k in before if self.states[k] == "open"}
                if failed:
                    self._fail(task, key, f"{failed[0]}, which it comes after, has failed")
                elif missing:
                    self.waiting[key] = task, missing
                else:
                    self.ready.append(task)
        if own and self.states[key] == "open":
            self.own[key] = self.own.get(key, 0) + 1
        elif own and self.states[key] == "made":  # asked for twice
            self._count(1, task)
        elif own and self.states[key] == "there":
            self.found += 1
            self.there = max(self.there, self.found)  # others make rows, too
        return key

    def _end(self, key: str, state: str, task: Task) -> None:
        self.states[key], times = state, self.own.pop(key, 0)
        self._count(times if state == "made" else 0, task)

    def _count(self, times: int, task: Task) -> None:
        self.made, self.spent = self.made + times, self.spent + times * task.cost

    def _fail(self, task: Task, key: str, error: str) -> None:
        self._end(key, "failed", task)
        self.failures.append((task, error))
        for other, (follower, keys) in list(self.waiting.items()):
            if key in keys and self.waiting.pop(other, None):
                self._fail(follower, other, f"{task}, which it comes after, has failed")
