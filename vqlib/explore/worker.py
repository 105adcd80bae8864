"""Work beside the notebook: one background thread that a newer request takes over, and the thread that may draw."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any

Job = Callable[[], object]


class Recent:
    """The `size` most recently used values by key; safe to use from several threads."""

    def __init__(self, size: int) -> None:
        self.size, self._values, self._lock = size, OrderedDict(), threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Any:
        """The value, from now on the last to go; None where there is none."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key]

    def put(self, key: Hashable, value: Any) -> Any:
        """Keep `value`, drop what was used longest ago; returns the value."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self.size:
                self._values.popitem(last=False)
        return value


class Worker:
    """One background thread that runs the newest job; jobs that a newer one overtook are never begun.

    A job that runs is not stopped from here: it asks by itself whether it is still wanted. The thread ends when
    there is nothing to do.
    """

    def __init__(self) -> None:
        self._lock, self._job, self._running = threading.Lock(), None, False

    def submit(self, job: Job) -> None:
        """Run `job` next, in place of one that still waits. It has to handle its own exceptions."""
        with self._lock:
            self._job = job
            if not self._running:
                self._running = True
                threading.Thread(target=self._work, name="vqlib-explore", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                job, self._job = self._job, None
                if job is None:
                    self._running = False
                    return
            job()


class Drawing:
    """Runs short jobs on the thread that made it: matplotlib's settings are global, so only one thread may draw.

    In a notebook that is the kernel's main thread, and a job runs between two cells or while a cell is in `wait`.
    """

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._thread = threading.get_ident()
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:  # no notebook: `wait` is the only moment at which jobs run
            self._loop = None

    def call(self, job: Job) -> None:
        """Have `job` run soon. It has to handle its own exceptions."""
        self._jobs.append(job)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._run_all)

    def wait(self, done: Callable[[], bool], timeout: float | None = None) -> None:
        """Until `done()`; jobs run meanwhile. TimeoutError after `timeout` s, RuntimeError on another thread."""
        if threading.get_ident() != self._thread:
            raise RuntimeError("wait() belongs on the thread that made the view")
        end = None if timeout is None else time.monotonic() + timeout
        self._run_all()
        while not done():
            if end is not None and time.monotonic() > end:
                raise TimeoutError(f"not done after {timeout:g} s")
            time.sleep(0.02)
            self._run_all()

    def _run_all(self) -> None:
        while self._jobs:
            self._jobs.popleft()()
