"""The thread that may draw, and how work beside the notebook has it draw."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable

Job = Callable[[], object]


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
