"""A DiT with random weights, small enough for a test to quantize, calibrate and sample in well under a second."""

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel

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
