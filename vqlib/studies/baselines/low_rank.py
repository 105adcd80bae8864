"""A low-rank part beside a uniform grid, in the manner of SVDQuant (Li et al. 2025), for weights alone.

W ≈ L R + Q: L R is the best of its rank in the metric of the layer's inputs, held in float16; what it leaves is put on a grid
by GPTQ. (SVDQuant also moves outliers out of activations, which stay as they are here.) Both factors and the grid's scales train.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vqlib.models.pipeline import Pipeline
from vqlib.quantizer.feedback import Columns, damped, quantize_columns
from vqlib.studies.baselines.baseline import Baseline
from vqlib.studies.baselines.gptq import fit_grid
from vqlib.studies.baselines.made import Layers, MadeLinear, Trained, build


@dataclass(frozen=True)
class LowRank:
    """Rank `rank` in float16, the rest in `bits` on grids of `group_size` inputs (None: a row)."""

    how: Trained
    bits: int = 2
    group_size: int | None = None
    rank: int = 2

    def seeded(self, seed: int) -> LowRank:
        """The same with another seed."""
        return replace(self, how=self.how.seeded(seed))

    def build(self, pipe: Pipeline, folder: Path | None = None) -> Baseline:
        """Raises ValueError naming a layer that has fewer inputs or outputs than the rank."""
        return build(pipe, folder, self)

    def layers(self, layers: Layers, hessians: Mapping[str, Tensor]) -> dict[str, MadeLinear]:
        for name, layer in layers.items():
            if not 1 <= self.rank <= min(layer.weight.shape):
                raise ValueError(f"rank={self.rank} is outside 1 … {min(layer.weight.shape)} ({name})")
        return {name: LowRankLinear(layer, hessians[name], self) for name, layer in layers.items()}


class LowRankLinear(MadeLinear):
    """left [out, r] · right [r, in] + scale [out, groups, 1] · (q − zero) [out, groups, group_size]."""

    def __init__(self, layer: nn.Linear, hessian: Tensor, how: LowRank) -> None:
        super().__init__(layer)
        weight = layer.weight.detach()
        left, right = low_rank(weight, hessian, how.rank)
        rest = weight - left @ right
        grid = fit_grid(rest, how.bits, how.group_size)
        kept = quantize_columns(rest, Columns.of(hessian, 1), lambda w, root, where: grid.round(w, where))
        levels = kept.view(self.out_features, -1, grid.group_size) / grid.scale[:, :, None]
        self.register_buffer("levels", levels.round())
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)
        self.scale = nn.Parameter(grid.scale[:, :, None].clone())
        self.stored_bits = how.bits * weight.numel() + (16 + how.bits) * grid.scale.numel()
        self.stored_bits += 16 * (left.numel() + right.numel())

    def weight(self) -> Tensor:
        return self.left @ self.right + (self.scale * self.levels).flatten(1)


def low_rank(weight: Tensor, hessian: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L [out, r], R [r, in] with the least tr((W − L R) H (W − L R)ᵀ), by the SVD of W H^½ (Eckart and Young)."""
    root = torch.linalg.cholesky(damped(hessian.double()))  # H = root rootᵀ
    u, s, v = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    right = torch.linalg.solve_triangular(root, v[:rank], upper=False, left=False)  # V root⁻¹
    balance = s[:rank].sqrt()
    return (u[:, :rank] * balance).float(), (balance[:, None] * right).float()
