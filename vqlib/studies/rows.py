"""The one store of rows: each a JSON file named by the frozen objects that made it, locked while it is being made."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from vqlib.system.files import write_bytes


def content_key(*made_of: Any) -> str:
    """16 hexadecimal digits for frozen objects and JSON-safe values: their classes and all their fields."""
    return hashlib.sha256(json.dumps(_plain(made_of), sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows in `folder`. A row is found by all that made it; a file that is damaged or says otherwise counts as none."""

    folder: Path

    def path(self, *made_of: Any) -> Path:
        return self.folder / f"{content_key(*made_of)}.json"

    def keys(self) -> set[str]:
        """What the rows that may be there are called, without a look into them."""
        try:
            return {name.removesuffix(".json") for name in os.listdir(self.folder) if name.endswith(".json")}
        except FileNotFoundError:
            return set()

    def read(self, *made_of: Any) -> dict | None:
        """The row; None while it is missing."""
        path, wanted = self.path(*made_of), _plain(made_of)
        try:
            found = json.loads(path.read_text())
            return found["row"] if found["made_of"] == wanted else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # ValueError: no JSON, no UTF-8
            return None

    def make(self, make: Callable[[Path], dict], *made_of: Any, wait: bool = False) -> bool:
        """Whether the row was made here: it was not there, nor (unless this waits) being made by another process.

        `make` is given a folder for unfinished work, which survives a kill and goes when the row is written.
        """
        if self.read(*made_of) is not None:
            return False
        path, unfinished = self.path(*made_of), self.folder / "unfinished" / content_key(*made_of)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path.with_suffix(".lock"), timeout=-1 if wait else 0):
                if self.read(*made_of) is not None:
                    return False
                content = {"made_of": _plain(made_of), "row": make(unfinished)}
                write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())
                shutil.rmtree(unfinished, ignore_errors=True)
                return True
        except Timeout:
            return False


def _plain(made_of: Any) -> Any:
    """As JSON reads it back: frozen objects with the names of their classes."""
    if dataclasses.is_dataclass(made_of):
        kind = type(made_of)
        return {"class": kind.__name__} | {name: _plain(getattr(made_of, name)) for name in _fields(kind)}
    if isinstance(made_of, Mapping):
        return {name: _plain(value) for name, value in made_of.items()}
    if isinstance(made_of, np.generic):
        return made_of.item()
    return [_plain(part) for part in made_of] if isinstance(made_of, (list, tuple)) else made_of


@functools.cache
def _fields(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))
