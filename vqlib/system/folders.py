"""A folder replaced as a whole: after a crash or SIGKILL at any moment it holds the old files or the new ones.

The new files are written to a sibling folder, flushed to the disk, and the two folders swap names in one system call
(Linux `renameat2`, macOS `renamex_np`). Where the system has no such call there is an instant between two renames; a
crash in it leaves the old folder under its backup name, and `recover_folder` puts it back.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from vqlib.system.files import UMASK

STALE_AFTER = 3600.0  # seconds after which a half-written sibling is taken for the remains of a killed process
_SWAP = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS
_AT_FDCWD = -100


@contextmanager
def write_folder(folder: Path, may_replace: Collection[str]) -> Iterator[Path]:
    """Yield an empty sibling folder to write into; on leaving without an error it becomes `folder`.

    Raises FileExistsError where `folder` holds anything besides the files named in `may_replace`.
    """
    folder = Path(folder).expanduser().absolute()
    _require_replaceable(folder, may_replace)
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(folder)
    _remove_stale(folder)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~UMASK)  # mkdtemp makes private folders; a checkpoint is an ordinary one
        for path in sorted(partial.rglob("*")):
            _flush(path)
        _flush(partial)
        _require_replaceable(folder, may_replace)
        _replace(partial, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after a swap this is the old folder


def recover_folder(folder: Path) -> None:
    """Undo the first half of a replacement that was cut off on a system that cannot swap folders."""
    folder = Path(folder).expanduser().absolute()
    if not folder.exists() and _backup(folder).exists():
        os.rename(_backup(folder), folder)


def swap_folders(a: Path, b: Path) -> bool:
    """Exchange the names of two folders in one system call; False, with nothing done, where that cannot be had."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        names = os.fsencode(a), os.fsencode(b)
        if sys.platform == "linux":
            return libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _SWAP) == 0
        if sys.platform == "darwin":
            return libc.renamex_np(*names, _SWAP) == 0
    except (AttributeError, OSError, TypeError):
        pass  # no such function in this C library: the caller takes two renames instead
    return False


def _replace(partial: Path, folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if not folder.exists():
        os.rename(partial, folder)
    elif not swap_folders(partial, folder):
        shutil.rmtree(_backup(folder), ignore_errors=True)
        os.rename(folder, _backup(folder))
        os.rename(partial, folder)
        shutil.rmtree(_backup(folder), ignore_errors=True)


def _backup(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def _require_replaceable(folder: Path, may_replace: Collection[str]) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; a folder is to be written there")
    others = sorted(path.name for path in folder.iterdir() if path.name not in may_replace)
    if others:
        raise FileExistsError(f"{folder} holds other files ({', '.join(others[:3])}): give a folder of its own")


def _remove_stale(folder: Path) -> None:
    for path in folder.parent.glob(f".{folder.name}.partial-*"):
        try:
            if time.time() - path.stat().st_mtime > STALE_AFTER:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            continue  # its owner has just finished


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
