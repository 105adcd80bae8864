"""A DiT with random weights, small enough for a test to quantize, calibrate and sample in well under a second."""

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from PIL import Image

from vqlib.models.ddpm import NoiseSchedule
from vqlib.models.pipeline import Pipeline


def transformer(seed: int = 0, blocks: int = 2) -> DiTTransformer2DModel:
    torch.manual_seed(seed)
    return (
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=blocks,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        )
        .eval()
        .requires_grad_(False)
    )


def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        sample_size=32,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    ).eval()


def pipeline(blocks: int = 2) -> Pipeline:
    return Pipeline("tiny", transformer(blocks=blocks), vae(), NoiseSchedule.linear(), tuple("abcdefghij"))


def fashion_mnist(folder: Path, count: int = 160) -> Path:
    """Four files in Fashion-MNIST's format with random images: every class equally often."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        pixels = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
        labels = np.arange(count, dtype=np.uint8) % 10
        header = struct.pack(">II", 2049, count)
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    return folder


def emoji(path: Path, each: int = 10) -> Path:
    """A .tgz in emoji-datasource's layout with plain squares: `each` emoji a class, hands with a skin tone, and one of no class.

    The red of a square tells which emoji it is, its blue the vendor's turn; what is around a square is transparent.
    """
    from vqlib.bundled.emoji_dataset import GROUPS, VENDORS

    entries, sides = [], 20
    for label, (category, parts) in enumerate(GROUPS.values()):
        for i in range(each):
            part = parts[0] + ("x" if parts[0].endswith("-") else "")
            entries.append({"unified": f"{label:X}-{i:X}", "category": category, "subcategory": part})
    entries.append({"unified": "F", "category": "Component", "subcategory": "skin-tone"})
    pictures = []
    for entry in entries:
        if entry["category"] == "People & Body" and entry["subcategory"].startswith("hand"):
            entry["skin_variations"] = {"1F3FB": {}}
        pictures += [entry, *entry.get("skin_variations", {}).values()]
    for i, picture in enumerate(pictures):
        picture |= {"sheet_x": i % sides, "sheet_y": i // sides} | {f"has_img_{vendor}": True for vendor in VENDORS}
    files = {"emoji.json": json.dumps(entries).encode()}
    for turn, vendor in enumerate(VENDORS):
        sheet = np.zeros((34 * sides, 34 * sides, 4), np.uint8)
        for i, entry in enumerate(entries):
            for picture in (entry, *entry.get("skin_variations", {}).values()):
                y, x = 34 * picture["sheet_y"] + 1, 34 * picture["sheet_x"] + 1
                sheet[y + 1 : y + 31, x + 1 : x + 31] = (i, 0, 100 * turn, 255)
        png = io.BytesIO()
        Image.fromarray(sheet).save(png, "png")
        files[f"img/{vendor}/sheets/32.png"] = png.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            about = tarfile.TarInfo(f"package/{name}")
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path
