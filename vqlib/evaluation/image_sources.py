"""Images from wherever they are, as a stream of uint8 blocks [B, C, H, W]: the one form every extractor takes.

Tensors, NumPy arrays, Datasets, iterators of batches, folders and `.npz` files are read block by block, so memory does
not grow with the number of images. What is not plainly an 8-bit image is refused, never converted in silence.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from vqlib.evaluation.image_folder import folder_batches, image_files

BLOCK = 500  # images; also the unit of the feature cache


def count_images(source) -> int | None:
    """Number of images, where it can be known without reading them; None for iterators."""
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.is_dir():
            return len(image_files(path))
        with _opened(path) as (_, shape):
            return shape[0]
    if _is_batches(source):
        return sum(len(batch) for batch in source)
    return len(source) if _is_dataset(source) else None


def image_blocks(source, block: int = BLOCK, ordered: bool = False) -> Iterator[Tensor]:
    """Blocks of exactly `block` images (the last may be smaller), uint8 [B, C, H, W] with C = 1 or 3, all of one size.

    `source`: uint8 tensor [N, C, H, W] · NumPy array [N, H, W, C] · map-style Dataset of uint8 [C, H, W] (of a tuple,
    the first part) · iterable of uint8 batches, for example a sampler · folder of images · `.npz` with `arr_0`, as ADM.
    `ordered`: labels belong to the images, so a folder's order must not be ambiguous. Raises ValueError for floats, NaN,
    another shape, mixed sizes, damaged files, pixels of 0 and 1 alone, or no images.
    """
    waiting: list[Tensor] = []
    shape, held, seen, brightest = None, 0, 0, 0
    for batch in _batches(source, block, ordered):
        batch = _checked(batch, shape, seen)
        shape, brightest = batch.shape[1:], max(brightest, int(batch.max()) if len(batch) else 0)
        waiting.append(batch)
        held, seen = held + len(batch), seen + len(batch)
        if held >= block:
            joined = torch.cat(waiting)
            full = held // block * block
            yield from joined[:full].split(block)
            waiting, held = [joined[full:]], held - full
    if held:
        yield torch.cat(waiting)
    if not seen:
        raise ValueError(f"no images in {_describe(source)}")
    if brightest <= 1:
        raise ValueError(f"no pixel of {seen} images is above {brightest}; pixels run from 0 to 255: all are black")


def fit_channels(images: Tensor, channels: int) -> Tensor:
    """Grey repeated to three channels, or three equal ones to one -> [B, channels, H, W]; color is never made grey."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)  # [B, 1, H, W] -> [B, 3, H, W]
    if not bool((images == images[:, :1]).all()):
        raise ValueError(f"images are in color ({tuple(images.shape[1:])}); the extractor takes {channels} channel")
    return images[:, :1].contiguous()  # [B, 3, H, W] -> [B, 1, H, W]


def _batches(source, block: int, ordered: bool) -> Iterator:
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        yield from folder_batches(path, block, ordered) if path.is_dir() else _npz_batches(path, block)
    elif isinstance(source, (Tensor, np.ndarray)):
        if source.ndim != 4:
            raise ValueError(f"images have shape {tuple(source.shape)}, expected [N, C, H, W] (NumPy: [N, H, W, C])")
        yield from (source[i : i + block] for i in range(0, len(source), block))
    elif _is_dataset(source):
        for start in range(0, len(source), block):
            items: list[Tensor] = []
            for i in range(start, min(start + block, len(source))):
                items.append(_one_image(source[i], i, items))
            yield torch.stack(items)
    elif isinstance(source, Iterable) and not isinstance(source, (Mapping, bytes)):
        yield from source
    else:
        raise ValueError(f"images of type {type(source).__name__}: give a tensor, Dataset, iterator, folder or .npz")


def _is_batches(source) -> bool:
    """Whether a list holds batches, not images."""
    return isinstance(source, (list, tuple)) and len(source) > 0 and getattr(source[0], "ndim", 0) == 4


def _is_dataset(source) -> bool:
    """Whether its items are images, by number."""
    counted = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    return counted and not _is_batches(source) and not isinstance(source, (Mapping, bytes))


def _one_image(item, index: int, before: list[Tensor]) -> Tensor:
    image = item[0] if isinstance(item, (tuple, list)) and item else item
    if not isinstance(image, Tensor) or image.ndim != 3:
        raise ValueError(f"image {index} is {_of(image)}, expected a uint8 tensor [C, H, W]")
    if before and (image.shape, image.dtype) != (before[0].shape, before[0].dtype):
        raise ValueError(f"image {index} is {_of(image)}, the images before are {_of(before[0])}")
    return image


def _checked(batch, shape: torch.Size | None, seen: int) -> Tensor:
    batch = batch[0] if isinstance(batch, (tuple, list)) and batch else batch  # a DataLoader's (images, labels)
    if not isinstance(batch, (Tensor, np.ndarray)) or not batch.ndim:
        raise ValueError(f"images from {seen} on are {_of(batch)}, expected a uint8 tensor [B, C, H, W]")
    where = f"images {seen} … {seen + len(batch) - 1}"
    if str(batch.dtype).removeprefix("torch.") != "uint8":
        nan = " and contain NaN" if isinstance(batch, Tensor) and bool(batch.isnan().any()) else ""
        raise ValueError(f"{where} are {batch.dtype}{nan}; metrics need uint8 pixels 0 … 255: convert them first")
    if isinstance(batch, np.ndarray):
        batch = torch.from_numpy(np.array(batch))  # a copy, for what is not writable or of another order
        batch = batch.permute(0, 3, 1, 2) if batch.ndim == 4 else batch  # [B, H, W, C] -> [B, C, H, W]
    if batch.ndim != 4 or batch.shape[1] not in (1, 3) or not all(batch.shape[2:]):
        raise ValueError(f"{where} have shape {tuple(batch.shape)}, expected [B, C, H, W] with C = 1 or 3")
    if shape is not None and batch.shape[1:] != shape:
        raise ValueError(f"{where} are {tuple(batch.shape[1:])}, the images before are {tuple(shape)}")
    # A fresh copy, not .contiguous(): one channel hides a channels-last order, which changes a convolution's last bits.
    return batch.clone(memory_format=torch.contiguous_format)


def _of(image) -> str:
    """An image's, or what is given for one's, type and shape."""
    kind = getattr(image, "dtype", None) or type(image).__name__
    return f"{kind} {tuple(image.shape)}" if hasattr(image, "shape") else str(kind)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """`arr_0` of an .npz behind its header, and its shape [N, H, W, C]. ValueError naming a damaged or foreign file."""
    if not path.is_file():
        raise ValueError(f"{path} is neither a folder of images nor an .npz file")
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            read = {(1, 0): np.lib.format.read_array_header_1_0}.get(np.lib.format.read_magic(file))
            shape, fortran, dtype = (read or np.lib.format.read_array_header_2_0)(file)
            if dtype != np.uint8 or len(shape) != 4 or fortran:
                raise ValueError(f"'arr_0' is {dtype} {shape}, expected uint8 [N, H, W, C]")
            yield file, shape
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} holds no readable images ('arr_0'): {error}") from None


def _npz_batches(path: Path, block: int) -> Iterator[np.ndarray]:
    """Read `arr_0` as a stream: ADM's reference holds 2 GB of images."""
    with _opened(path) as (file, shape):
        each = int(np.prod(shape[1:]))
        for start in range(0, shape[0], block):
            count = min(block, shape[0] - start)
            data = file.read(count * each)
            if len(data) != count * each:
                raise ValueError(f"it ends after {start + len(data) // each} of {shape[0]} images")
            yield np.frombuffer(bytearray(data), np.uint8).reshape(count, *shape[1:])


def _describe(source) -> str:
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__
