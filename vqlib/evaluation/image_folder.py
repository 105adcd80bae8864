"""A folder of image files: which of its files are images of the set, in which order, and their pixels in 8 bits.

What is not plainly an 8-bit image without transparency is scaled where its range is known (16-bit gray) or refused by name;
a photograph lies as its EXIF says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
UNKNOWN_TO_PILLOW = {".heic", ".heif", ".avif", ".jxl", ".exr", ".hdr"}
PLAIN = ("1", "L", "P", "RGB")  # Pillow's modes of up to 8 bits a channel that RGB holds without loss
WITH_ALPHA = ("LA", "PA", "RGBA")


def image_files(folder: Path, ordered: bool = False) -> list[Path]:
    """Every image below `folder`, "2.png" before "10.png"; hidden files and folders and __MACOSX are no part of it.

    ordered: the order stands for something, labels for example, so names are refused that have more than one: two files of
    one number ("1.png", "01.png"), capitals that decide ("b.png", "C.png"). Raises ValueError naming an image of a kind that
    is not read, and a link that leads nowhere or to a folder.
    """
    found = [path for path in folder.rglob("*") if not _hidden(path.relative_to(folder))]
    known = Image.registered_extensions().keys() | UNKNOWN_TO_PILLOW
    for path in found:
        suffix = path.suffix.lower()
        if path.is_symlink() and (path.is_dir() or not path.exists()):
            raise ValueError(
                f"{path} is a link to {path.readlink()}, which is not followed: give the images themselves"
            )
        if suffix in known and suffix not in SUFFIXES and path.is_file():
            raise ValueError(
                f"{path} is an image that is not read here; known are {', '.join(SUFFIXES)}: convert or move it"
            )
    keys = {path: _natural(folder, path) for path in found if path.suffix.lower() in SUFFIXES and path.is_file()}
    files = sorted(keys, key=lambda path: (keys[path], str(path)))
    for a, b in zip(files, files[1:], strict=False) if ordered else ():
        if keys[a] == keys[b]:
            raise ValueError(f"{a} and {b} have one number: the order in which labels belong to them is not known")
        if _folded(keys[a]) >= _folded(keys[b]):
            raise ValueError(f"{a} and {b} are in another order without capitals: which one labels follow is not known")
    return files


def folder_batches(folder: Path, block: int, ordered: bool = False) -> Iterator[Tensor]:
    """The images in the order of their names as uint8 RGB [b, 3, H, W], b ≤ block. ValueError naming the odd one out."""
    files, first = image_files(folder, ordered), None
    for start in range(0, len(files), block):
        images = [read_image(path) for path in files[start : start + block]]
        first = images[0].shape if first is None else first
        odd = next((i for i, image in enumerate(images) if image.shape != first), None)
        if odd is not None:
            raise ValueError(
                f"{files[start + odd]} is {tuple(images[odd].shape)}, the images before are {tuple(first)}"
            )
        yield torch.stack(images)


def read_image(path: Path) -> Tensor:
    """One file as uint8 RGB [3, H, W]. Raises ValueError naming a damaged, animated, transparent or unknown one."""
    try:
        with Image.open(path) as image:
            raw = str(image.tile)  # names the bits of the file, where the mode has those that Pillow leaves of them
            image.load()
            frames = getattr(image, "n_frames", 1)
            image = ImageOps.exif_transpose(image)  # a copy, turned as every viewer shows it
    except Exception as error:  # Pillow's decoders raise a dozen kinds for files that are cut off or damaged
        raise ValueError(f"{path} cannot be read as an image ({error})") from None
    if frames != 1:
        raise ValueError(f"{path} holds {frames} frames; one image is needed")
    if image.mode.startswith("I;16") and "transparency" not in image.info:
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))  # 0 … 65535 -> 0 … 255
    elif ";16" in raw:
        raise ValueError(f"{path} has 16 bits a channel and color or transparency: convert it to 8 bits")
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        least = image.getchannel("A").getextrema()[0]
        if least < 255:
            raise ValueError(f"{path} has transparent pixels (alpha from {least}): put it on a background first")
        image = image.convert("RGB")
    if image.mode not in PLAIN:
        raise ValueError(
            f"{path} has mode {image.mode!r}; known are {', '.join((*PLAIN, *WITH_ALPHA, 'I;16'))}: convert it to 8 bits"
        )
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)  # [H, W, 3] -> [3, H, W]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _natural(folder: Path, path: Path) -> tuple:
    """A key in which runs of digits count as numbers, and the suffix not at all."""
    name = path.relative_to(folder).with_suffix("").as_posix()
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    return tuple((0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts)


def _folded(key: tuple) -> tuple:
    return tuple((kind, number, word.casefold()) for kind, number, word in key)
