"""Weights for measurements where the real ones cannot be had: a DiT's geometry, seeded, of realistic spread."""

import torch
from diffusers import DiTTransformer2DModel

from vqlib.models import pipeline, structure
from vqlib.models.ddpm import NoiseSchedule
from vqlib.models.geometry import Geometry

ROW_SPREAD, TAIL_SPREAD = 0.3, 0.5  # of the logarithm of a row's scale, and of a single weight's


def weight(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """[rows, columns] with standard deviation about 1/√columns: rows of different scale, tails heavier than a normal's."""
    given = {"generator": generator, "device": generator.device}
    scale = torch.exp(ROW_SPREAD * torch.randn(rows, 1, **given))
    scale = scale * torch.exp(TAIL_SPREAD * torch.randn(rows, columns, **given).clamp_(-4, 4))
    return torch.randn(rows, columns, **given).mul_(scale).mul_(columns**-0.5)


def seeded_pipeline(geometry: Geometry, device: torch.device, seed: int = 0) -> pipeline.Pipeline:
    """A pipeline, without VAE, whose quantizable weights are `weight`s, drawn on the device; the rest has diffusers' own start."""
    torch.manual_seed(seed)
    with torch.device(device):
        transformer = DiTTransformer2DModel(**geometry.config()).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for layer in structure.quantizable(transformer).values():
        layer.weight.copy_(weight(*layer.weight.shape, generator))
    first, *rest = (block.norm1.emb for block in transformer.transformer_blocks)
    for embedder in rest:  # a DiT has one, of which diffusers keeps a copy in every block
        embedder.load_state_dict(first.state_dict())
    names = tuple(map(str, range(geometry.classes)))
    transformer = structure.with_fast_products(transformer)
    return pipeline.Pipeline("seeded", transformer, None, NoiseSchedule.linear(), names)
