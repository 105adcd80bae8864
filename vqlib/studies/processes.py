"""Engines that need nothing: this process, and processes of this machine by the standard library."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path

from vqlib.studies.tasks import Outcome, Task, attempt, key_of


class Here:
    """This process, one task after the other, on as many threads and whichever device it has."""

    room = 1

    def start(self, folder: Path, task: Task, wait: bool) -> None:
        self._next = folder, task, wait

    def ended(self) -> list[Outcome]:
        return [attempt(*self._next)]

    def close(self) -> None: ...


class Processes:
    """`workers` processes of this machine, one thread each; they sample faster than one with that many threads."""

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers} must be at least 1")
        self.room = workers
        self._idle: list[_Process] = []
        self._busy: dict[str, _Process] = {}

    def start(self, folder: Path, task: Task, wait: bool) -> None:
        process = self._idle.pop() if self._idle else _Process()
        self._busy[key_of(task)] = process
        process.send(folder, task, wait)

    def ended(self) -> list[Outcome]:
        heard = connection.wait([process.connection for process in self._busy.values()])
        found = []
        for key, process in [(k, p) for k, p in self._busy.items() if p.connection in heard]:
            del self._busy[key]
            try:
                found.append(process.connection.recv())
                self._idle.append(process)
            except (EOFError, OSError):
                process.stop()
                found.append(Outcome(key, "lost", error=f"the end of its process (exit code {process.exit_code})"))
        return found

    def close(self) -> None:
        for process in [*self._idle, *self._busy.values()]:
            process.stop()
        self._idle, self._busy = [], {}


class _Process:
    """A worker and the way to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _one_thread():
            self.process.start()
        theirs.close()

    @property
    def exit_code(self) -> int | None:
        return self.process.exitcode

    def send(self, *job) -> None:
        try:
            self.connection.send(job)
        except OSError:  # killed while it was idle: `ended` hears of it
            pass

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


def _serve(theirs: connection.Connection) -> None:
    """What a worker does until the process that has begun it is gone."""
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            job = theirs.recv()
        except EOFError:
            return
        theirs.send(attempt(*job))


@contextmanager
def _one_thread():
    """Processes that begin within the block have one thread."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
