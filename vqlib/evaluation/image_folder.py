"""A folder of image files: which of its files are images of the set, in which order, and their pixels in 8 bits.

What is not plainly an 8-bit image without transparency is scaled where its range is known (16-bit gray) or refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PLAIN = ("1", "L", "P", "RGB")  # Pillow's modes of up to 8 bits a channel that RGB holds without loss
WITH_ALPHA = ("LA", "PA", "RGBA")


def image_files(folder: Path, ordered: bool = False) -> list[Path]:
    """Every image below `folder`, "2.png" before "10.png"; hidden files and folders and __MACOSX are no part of it.

    ordered: the order stands for something, labels for example, so two files of one number ("1.png", "01.png") are refused.
    Raises ValueError naming an image of a kind that is not read.
    """
    found = [path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder))]
    known = Image.registered_extensions()
    for path in found:
        suffix = path.suffix.lower()
        if suffix in known and suffix not in SUFFIXES:
            raise ValueError(
                f"{path} is an image that is not read here; known are {', '.join(SUFFIXES)}: convert or move it"
            )
    files = sorted(
        (path for path in found if path.suffix.lower() in SUFFIXES), key=lambda p: (_natural(folder, p), str(p))
    )
    for a, b in zip(files, files[1:], strict=False) if ordered else ():
        if _natural(folder, a) == _natural(folder, b):
            raise ValueError(f"{a} and {b} have one number: the order in which labels belong to them is not known")
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
            image.load()
            frames = getattr(image, "n_frames", 1)
            image = image.copy()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's words for files that are cut off or damaged
        raise ValueError(f"{path} cannot be read as an image ({error})") from None
    if frames != 1:
        raise ValueError(f"{path} holds {frames} frames; one image is needed")
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))  # 0 … 65535 -> 0 … 255
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
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"([0-9]+)", name) if part)
