"""A study without a shared file system: results in an object store (s3://, gs://, …), each machine working in its own folder.

Whatever fsspec opens is a store. A task's files go there before its row, so that a row that is there stands for whole results.
Unfinished work stays on the machine that began it: what is lost with a machine is made from its start.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import fsspec

from vqlib.studies.tasks import Outcome, Task, attempt, rows_of


@dataclass(frozen=True)
class Store:
    """`url`: where the study is kept, as fsspec has it; credentials are the environment's."""

    url: str

    def attempt(self, folder: Path, task: Task, wait: bool) -> Outcome:
        """`tasks.attempt` with what the task reads fetched before, and what it made kept afterwards."""
        try:
            if not self.fetch_row(folder, task):
                for before in task.after():
                    self._fetch_rows(folder, before)
                    for name in before.leaves():
                        self._fetch(folder, name)
        except OSError as error:
            return _lost(folder, task, error)
        outcome = attempt(folder, task, wait)
        try:
            if outcome.state in ("made", "there"):
                self.keep(folder, task)
        except OSError as error:
            return _lost(folder, task, error)
        return outcome

    def fetch_row(self, folder: Path, task: Task) -> bool:
        """Whether the task's row is in `folder`, now that the store's has been fetched."""
        rows = rows_of(folder)
        if rows.read(*task.made_of()) is None:
            self._fetch(folder, str(rows.path(*task.made_of()).relative_to(folder)))
        return rows.read(*task.made_of()) is not None

    def keep(self, folder: Path, task: Task) -> None:
        """Put what the task made into the store, its row last; nothing where the row is there: then all is."""
        row = rows_of(folder).path(*task.made_of()).relative_to(folder).as_posix()
        system, root = fsspec.core.url_to_fs(self.url)
        if system.exists(f"{root.rstrip('/')}/{row}"):
            return
        for name in (*task.leaves(), row):
            files = [path for path in (folder / name, *(folder / name).rglob("*")) if path.is_file()]
            for path in files:
                if path.suffix != ".lock":
                    self._put(path, path.relative_to(folder).as_posix())

    def _fetch_rows(self, folder: Path, task: Task) -> None:
        self.fetch_row(folder, task)
        for before in task.after():
            self._fetch_rows(folder, before)

    def _fetch(self, folder: Path, name: str) -> None:
        """A file or folder that is not here yet, whole or not at all; nothing where the store has none."""
        if (folder / name).exists():
            return
        system, root = fsspec.core.url_to_fs(self.url)
        coming, start = folder / f"{name}.fetched-{os.getpid()}", f"{root.rstrip('/')}/{name}"
        try:
            for remote in system.find(start):
                local = coming / remote[len(start) :].lstrip("/") if remote != start else coming
                local.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(remote, str(local))
            if coming.exists():
                coming.replace(folder / name)
        finally:
            shutil.rmtree(coming, ignore_errors=True)
            if coming.is_file():
                coming.unlink()

    def _put(self, path: Path, name: str) -> None:
        system, root = fsspec.core.url_to_fs(self.url)
        remote = f"{root.rstrip('/')}/{name}"
        system.makedirs(remote.rsplit("/", 1)[0], exist_ok=True)
        system.put_file(str(path), remote)


def _lost(folder: Path, task: Task, error: OSError) -> Outcome:
    """An attempt that the store did not let be: it is tried again."""
    row = rows_of(folder).path(*task.made_of())
    return Outcome(row.stem, "lost", error=f"the store: {type(error).__name__}: {error}")
