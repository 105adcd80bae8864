"""Lattice codes with rotations, in the manner of QuIP# (Tseng et al. 2024): 2 bits a weight, nothing learned, nothing stored but codes.

W' = U W Vᵀ with seeded random rotations U [out, out], V [in, in] is nearly Gaussian; its sub-vectors of 8 are rounded to the
E8P points, 2^16 of them, with error feedback in the rotated inputs' metric. QuIP# takes Hadamard matrices, which these widths do
not have; a random rotation does the same at more cost. What is trained is what QuIP# trains: a gain a row and a column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from vqlib import kernels
from vqlib.models.pipeline import Pipeline
from vqlib.quantizer.error_feedback import candidates_with_feedback
from vqlib.quantizer.feedback import Columns
from vqlib.studies.baselines.baseline import Baseline
from vqlib.studies.baselines.made import Layers, MadeLinear, Trained, build

D = 8
SHORT = 10.0  # squared length up to which all absolute values are taken: 227 of them; 29 of length 12 fill the 256
SAMPLE = 2048  # sub-vectors of a unit Gaussian that the lattice's scale is chosen on
SCALES = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)


@dataclass(frozen=True)
class Lattice:
    """E8P codes of rotated weights; `seed`: of the rotations."""

    how: Trained
    seed: int = 0

    def seeded(self, seed: int) -> Lattice:
        """The same with another seed."""
        return replace(self, how=self.how.seeded(seed), seed=seed)

    def build(self, pipe: Pipeline, folder: Path | None = None) -> Baseline:
        """Raises ValueError naming a layer whose width 8 does not divide."""
        return build(pipe, folder, self)

    def layers(self, layers: Layers, hessians: Mapping[str, Tensor]) -> dict[str, MadeLinear]:
        for name, layer in layers.items():
            if layer.in_features % D:
                raise ValueError(f"in_features {layer.in_features} is not divisible by d={D} ({name})")
        points, trained = e8p(), self.how.distillation is not None
        points = points * gaussian_scale(points)
        made = {}
        for index, (name, layer) in enumerate(layers.items()):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
            left, right = rotation(layer.out_features, generator), rotation(layer.in_features, generator)
            made[name] = LatticeLinear(layer, hessians[name], left, right, points, trained)
        return made


class LatticeLinear(MadeLinear):
    """diag(a) Uᵀ σ P[A] V diag(b): points P of the lattice, gains a [out] and b [in], which are 1 and not stored untrained."""

    def __init__(
        self, layer: nn.Linear, hessian: Tensor, left: Tensor, right: Tensor, points: Tensor, trained: bool
    ) -> None:
        super().__init__(layer)
        weight = left @ layer.weight.detach().double().cpu() @ right.T
        scale = weight.square().mean().sqrt()
        metric = right @ hessian.double().cpu() @ right.T
        chosen = candidates_with_feedback((weight / scale).float(), Columns.of(metric, D), points)
        codes = chosen.indices[:, 0].long()
        rounded = points[codes].double().view(weight.shape)
        base = left.T @ (scale * rounded) @ right
        self.register_buffer("base", base.float().to(layer.weight.device))
        device = layer.weight.device
        self.rows = nn.Parameter(torch.ones(self.out_features, 1, device=device), requires_grad=trained)
        self.columns = nn.Parameter(torch.ones(self.in_features, device=device), requires_grad=trained)
        gains = 16 * (self.out_features + self.in_features) if trained else 0
        self.stored_bits = 16 * len(codes) + 32 + gains

    def weight(self) -> Tensor:
        return self.rows * self.base * self.columns


@lru_cache(1)
def e8p() -> Tensor:
    """The 2^16 points of E8P, float32 [65536, 8]: half-odd vectors of even sum, short ones, moved by ±¼.

    256 patterns of absolute values × 7 free signs (the eighth makes the sum even) × 2 shifts; of the patterns of squared length
    12 the first 29 in lexicographic order, any of which would do.
    """
    values = torch.tensor(list(product((0.5, 1.5, 2.5), repeat=D)))
    length = values.square().sum(dim=1)
    patterns = torch.cat([values[length <= SHORT], values[length == 12.0]])[:256]
    signs = torch.tensor(list(product((1.0, -1.0), repeat=D - 1)))
    signs = torch.cat([signs, torch.ones(len(signs), 1)], dim=1)  # [128, 8]
    points = (patterns[:, None] * signs).view(-1, D)
    odd = points.sum(dim=1).remainder(2.0) != 0
    points[odd, -1] *= -1.0  # changes the sum by an odd number
    return torch.cat([points + 0.25, points - 0.25])


def gaussian_scale(points: Tensor) -> float:
    """The factor of the points [k, 8] with the least squared error on a unit Gaussian."""
    sample = torch.randn(SAMPLE, D, generator=torch.Generator().manual_seed(0))
    rounded = {factor: factor * points[kernels.assign(sample, factor * points)] for factor in SCALES}
    return min(SCALES, key=lambda factor: float((sample - rounded[factor]).square().mean()))


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random rotation, float64 [size, size], uniform over all (QR of a Gaussian matrix with the signs of R's diagonal)."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()
