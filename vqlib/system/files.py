"""One file, whole or not at all: written beside its place, flushed to the disk, then renamed over the old one."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a new file beside `path`, whose folder is made; on leaving without an error it takes the place of `path`."""
    path = Path(path).expanduser()
    path = path.resolve() if path.is_symlink() else path  # what a link leads to is replaced, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~UMASK)  # mkstemp's files are private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_remains(path: str | Path) -> None:
    """Remove what a kill inside `replacing` left beside `path`; only for its one writer, who holds a lock."""
    path = Path(path).expanduser()
    for remains in path.parent.glob(f".{path.name}.*"):
        remains.unlink(missing_ok=True)


def _umask() -> int:
    """The permission bits that this process takes from new files; asking changes them for a moment."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


UMASK = _umask()  # asked once, while no other thread writes


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write `content`; returns the path."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return Path(path).expanduser()


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file; returns the path. Copied first is only what is elsewhere, strided, or shares memory.

    What the disk refuses is an OSError, as it is of every other file.
    """
    with replacing(path) as temporary:
        try:
            save_file(_apart(tensors), temporary, metadata=metadata)
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    return Path(path).expanduser()


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are now, on the CPU: what is done to the originals later does not reach them."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, on the CPU, each with memory of its own, as safetensors demands."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage()
        if memory.nbytes() != tensor.numel() * tensor.element_size() or memory.data_ptr() in taken:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        found[name] = tensor
    return found
