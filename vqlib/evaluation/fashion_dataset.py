"""Fashion-MNIST (Zalando Research, MIT licence) as 32×32 images, from disk or the usual download, checksums verified."""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.request
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DOWNLOAD = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
SHA256 = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist


def load(split: str, folder: str | Path | None = None, verify: bool = True) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 1, 32, 32] (28×28 with a 2-pixel black border) and labels int64 [N] of `train` or `test`.

    Files are looked for in `folder`, `$FASHION_MNIST`, then Debian's package and `~/.cache/fashion-mnist`; what the first of
    these that is given lacks is downloaded into it. Raises ValueError on a checksum that does not match; `verify=False` takes other files of that form.
    """
    prefix = {"train": "train", "test": "t10k"}.get(split)
    if prefix is None:
        raise ValueError(f"split {split!r} is not one of 'train', 'test'")
    root = _find(folder)
    pixels = np.frombuffer(_read(root, f"{prefix}-images-idx3-ubyte.gz", verify), np.uint8, offset=16)
    labels = np.frombuffer(_read(root, f"{prefix}-labels-idx1-ubyte.gz", verify), np.uint8, offset=8)
    images = torch.from_numpy(pixels.reshape(-1, 1, 28, 28).copy())
    return torch.nn.functional.pad(images, (2, 2, 2, 2)), torch.from_numpy(labels.astype(np.int64))


def _find(folder: str | Path | None) -> Path:
    given = folder or os.environ.get("FASHION_MNIST")
    if given:
        return Path(given).expanduser()
    return DEBIAN_FOLDER if DEBIAN_FOLDER.is_dir() else Path.home() / ".cache" / "fashion-mnist"


def _read(root: Path, name: str, verify: bool) -> bytes:
    path = root / name
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        urllib.request.urlretrieve(DOWNLOAD + name, part)
        part.replace(path)
    packed = path.read_bytes()
    found = hashlib.sha256(packed).hexdigest()
    if verify and found != SHA256[name]:
        raise ValueError(f"{path}: SHA-256 is {found}, expected {SHA256[name]}; remove the file and try again")
    return gzip.decompress(packed)
