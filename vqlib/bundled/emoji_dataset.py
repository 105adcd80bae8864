"""Colour emoji as 32×32 pictures on white: Noto (Google, Apache-2.0) and Twemoji (Twitter, CC-BY 4.0), from emoji-datasource.

The npm package holds one sheet of pictures a vendor, 32 px each with a border of 1 px, and `emoji.json`, which says where
each one is. Only the sheets of these two vendors are read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PACKAGE = "emoji-datasource@16.0.0"
VENDORS = ("google", "twitter")
SHA256 = {
    "emoji.json": "1d602e65be88772bf8cc368ce16b855d719eeddbafe128d471b80203f494d29f",
    "img/google/sheets/32.png": "b417e9f6cd4bbc10656bbfd5e13b6e9a2545b55e6a4cf7312d75be1faaa34952",
    "img/twitter/sheets/32.png": "2767ef2e87cbfb6cc12ac46596c339549afaf0ae8771cf51100c8853f6bde632",
}
GROUPS = {  # class: (category of emoji.json, its sub-categories; a dash at the end: all that begin so)
    "face": ("Smileys & Emotion", ("face-",)),
    "hand": ("People & Body", ("hand-", "hands")),
    "person": ("People & Body", ("person", "person-gesture", "person-role")),
    "animal": ("Animals & Nature", ("animal-",)),
    "food": ("Food & Drink", ("food-", "drink")),
    "flag": ("Flags", ("country-flag", "subdivision-flag")),
    "vehicle": ("Travel & Places", ("transport-",)),
    "building": ("Travel & Places", ("place-building", "place-religious", "place-other")),
    "clothing": ("Objects", ("clothing",)),
    "sign": ("Symbols", ("arrow", "zodiac", "av-symbol", "keycap", "alphanum")),
    "heart": ("Smileys & Emotion", ("heart",)),
    "clock": ("Travel & Places", ("time",)),
}
CLASSES = tuple(GROUPS)
ONE_WAY = ("flag", "sign", "clock")  # wrong in a mirror
TEST_SHARE = 0.2  # of each class's emoji
SIZE, PITCH = 32, 34  # pixels of a picture, and from one to the next in a sheet


def load(split: str, source: str | Path | None = None, verify: bool = True) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [N, 3, 32, 32] and labels int64 [N] of `train`, `test` or `rest`: the emoji of no class, labelled −1.

    An emoji is in one split with all of its vendors and skin tones: of each class the fifth whose codes have the least
    SHA-256 is the test's. `source`: the package, unpacked or as its .tgz, by default `$EMOJI_DATASOURCE`. Raises
    FileNotFoundError where it is not, and ValueError for checksums of another version unless `verify` is False.
    """
    if split not in ("train", "test", "rest"):
        raise ValueError(f"split {split!r} is not one of 'train', 'test', 'rest'")
    files = _read(source)
    for name, expected in SHA256.items() if verify else ():
        if (found := hashlib.sha256(files[name]).hexdigest()) != expected:
            raise ValueError(f"{name} has SHA-256 {found}, expected {expected}: is this {PACKAGE}?")
    emoji = json.loads(files["emoji.json"])
    sheets = {vendor: _on_white(files[f"img/{vendor}/sheets/32.png"]) for vendor in VENDORS}
    labels = [_class_of(entry) for entry in emoji]
    tested = _tested(emoji, labels)
    found = [
        (_cut(sheets[vendor], picture), label)
        for entry, label in zip(emoji, labels)
        if _split_of(entry, label, tested) == split
        for picture in (entry, *entry.get("skin_variations", {}).values())
        for vendor in VENDORS
        if picture[f"has_img_{vendor}"]
    ]
    images = torch.from_numpy(np.stack([image for image, _ in found])).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([label for _, label in found])


def balanced(images: Tensor, labels: Tensor, each: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`each` pictures of every class, uint8 [K·each, 3, 32, 32] and int64 [K·each], class by class.

    Where a class has fewer they come again, moved by up to a pixel each way, which lets white in, and mirrored half of the
    time where a mirror does no harm; where it has more, `each` of them are drawn. A seed means the same pictures.
    """
    generator, found = torch.Generator().manual_seed(seed), []
    for label, name in enumerate(CLASSES):
        own = (labels == label).nonzero()[:, 0]
        own = own[torch.randperm(len(own), generator=generator)]
        copies = [images[own]]
        while sum(map(len, copies)) < each:
            down, right = (torch.randint(-1, 2, (2,), generator=generator)).tolist()
            mirrored = name not in ONE_WAY and bool(torch.randint(2, (1,), generator=generator))
            copies.append(_moved(images[own].flip(3) if mirrored else images[own], down, right))
        found.append(torch.cat(copies)[:each])
    return torch.cat(found), torch.arange(len(CLASSES)).repeat_interleave(each)


def _class_of(entry: dict) -> int:
    for label, (category, parts) in enumerate(GROUPS.values()):
        for part in parts if entry["category"] == category else ():
            if entry["subcategory"] == part or (part.endswith("-") and entry["subcategory"].startswith(part)):
                return label
    return -1


def _tested(emoji: list[dict], labels: list[int]) -> set[str]:
    """Codes of the test's emoji."""
    chosen = set()
    for label in range(len(CLASSES)):
        codes = sorted(
            (entry["unified"] for entry, found in zip(emoji, labels) if found == label),
            key=lambda code: hashlib.sha256(code.encode()).digest(),
        )
        chosen.update(codes[: round(TEST_SHARE * len(codes))])
    return chosen


def _split_of(entry: dict, label: int, tested: set[str]) -> str:
    if label < 0:
        return "rest"
    return "test" if entry["unified"] in tested else "train"


def _on_white(png: bytes) -> np.ndarray:
    """A sheet uint8 [H, W, 3], its transparent parts white."""
    sheet = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", sheet.size, "white")
    return np.asarray(Image.alpha_composite(white, sheet).convert("RGB"))


def _cut(sheet: np.ndarray, picture: dict) -> np.ndarray:
    x, y = PITCH * picture["sheet_x"] + 1, PITCH * picture["sheet_y"] + 1
    return sheet[y : y + SIZE, x : x + SIZE]


def _read(source: str | Path | None) -> dict[str, bytes]:
    given = source or os.environ.get("EMOJI_DATASOURCE")
    help = f"get the package with `npm pack {PACKAGE}` and name the .tgz, or the folder it unpacks to"
    if not given:
        raise FileNotFoundError(f"no emoji: {help}, as an argument or in EMOJI_DATASOURCE")
    path = Path(given).expanduser()
    try:
        if path.is_dir():
            root = path / "package" if (path / "package").is_dir() else path
            return {name: (root / name).read_bytes() for name in SHA256}
        with tarfile.open(path) as archive:
            return {name: archive.extractfile(f"package/{name}").read() for name in SHA256}
    except (OSError, KeyError, tarfile.TarError) as error:
        raise FileNotFoundError(f"{path} holds no {PACKAGE} ({error}): {help}") from None


def _moved(images: Tensor, down: int, right: int) -> Tensor:
    """Pictures so many pixels further down and right."""
    canvas = torch.nn.functional.pad(images, (1, 1, 1, 1), value=255)
    return canvas[..., 1 - down : 1 - down + SIZE, 1 - right : 1 - right + SIZE]
