"""One description of work: a frozen task, found again by its contents, and one attempt at it, wherever that is made.

A task's result is a row of `Rows` under the study's folder; what it writes besides lies there, too. A task that is there
is never made again, whoever made it: tables, ablations and sweeps are nothing but lists of the rows they want.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil

from vqlib.studies.rows import Rows, content_key

# What passes by itself, or on another machine: no space, no quota, a disk or a server that does not answer.
PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}


@dataclass(frozen=True)
class Needs:
    """What a task takes while it runs: cores, GPUs (a part of one, too), bytes of the host's memory (0: not known)."""

    cpus: int = 1
    gpus: float = 0.0
    memory: int = 0


class Task(Protocol):
    """A frozen dataclass; `str` names it for readers."""

    @property
    def needs(self) -> Needs: ...

    def made_of(self) -> tuple:
        """Frozen objects and JSON-safe values: all that its result depends on, and what it is found by."""

    @property
    def cost(self) -> float:
        """How much work it is beside others of its study."""

    def after(self) -> Sequence[Task]:
        """The tasks whose results it reads."""

    def leaves(self) -> Sequence[str]:
        """Files and folders that it writes besides its row, under the study's folder."""

    def run(self, folder: Path, unfinished: Path) -> dict:
        """The result, JSON-safe. `unfinished`: a folder that survives a kill and goes when the result is kept."""


@dataclass(frozen=True)
class Lazily:
    """Tasks that are thought of anew each time one goes through them: a list that nobody keeps."""

    each: Callable[[], Iterator[Task]]

    def __iter__(self) -> Iterator[Task]:
        return self.each()


@dataclass(frozen=True)
class Outcome:
    """How one attempt ended. `state`: "made"; "there" already; "taken" by another process, and so left to it; "failed" for
    its own reason; "lost" for one that may pass: a killed worker, a node that left, a full disk.
    """

    key: str
    state: str
    where: str = ""
    seconds: float = 0.0
    error: str = ""


def rows_of(folder: str | Path) -> Rows:
    """The results kept in a study's folder."""
    return Rows(Path(folder) / "rows")


def key_of(task: Task) -> str:
    """What the task, and nothing else, is called."""
    return content_key(*task.made_of())


def attempt(folder: Path, task: Task, wait: bool = False) -> Outcome:
    """Make the task here unless it is there, or another process has it (then `wait`, or leave it). Raises no Exception."""
    start, rows, key, where = time.monotonic(), rows_of(folder), key_of(task), f"{platform.node()}:{os.getpid()}"
    state, error = "", ""
    try:
        with _under_way(folder, key, str(task), where):
            state = "made" if rows.make(partial(task.run, Path(folder)), *task.made_of(), wait=wait) else "there"
            if state == "there" and rows.read(*task.made_of()) is None:
                state = "taken"
    except Exception as raised:
        state = "lost" if isinstance(raised, OSError) and raised.errno in PASSING else "failed"
        last = traceback.extract_tb(raised.__traceback__)[-1]
        error = f"{type(raised).__name__}: {raised} ({Path(last.filename).name}, line {last.lineno})"
    return Outcome(key, state, where, time.monotonic() - start, error)


def under_way(folder: str | Path) -> list[dict[str, Any]]:
    """What is being made now, longest first: task, where (host:process), since (seconds of the clock)."""
    found = []
    for path in (Path(folder) / "running").glob("*.json"):
        try:
            one = json.loads(path.read_text())
        except (OSError, ValueError):  # it ended just now, or is being written
            continue
        host, process = one["where"].rsplit(":", 1)
        if host == platform.node() and not psutil.pid_exists(int(process)):  # a whole study that was killed
            path.unlink(missing_ok=True)
        else:
            found.append(one)
    return sorted(found, key=lambda one: one["since"])


def forget(folder: str | Path, key: str) -> None:
    """No attempt at this task is under way: its worker is gone."""
    _note(folder, key).unlink(missing_ok=True)


@contextmanager
def _under_way(folder: str | Path, key: str, name: str, where: str):
    note = _note(folder, key)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"task": name, "where": where, "since": time.time()}))
    except OSError:  # a full disk; a notice is not worth an attempt
        pass
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def _note(folder: str | Path, key: str) -> Path:
    return Path(folder) / "running" / f"{key}.json"
