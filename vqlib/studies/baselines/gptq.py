"""GPTQ (Frantar et al. 2023) without data: uniform grids, Hessians from the model's own trajectory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vqlib.calibrator.hessians import input_hessians
from vqlib.models.pipeline import Pipeline
from vqlib.quantizer.feedback import Columns, quantize_columns
from vqlib.studies.baselines.baseline import Baseline, Moments, uniform


@dataclass(frozen=True)
class GPTQ:
    """Every block Linear column by column on its grid of `group_size` inputs (None: a row), the error passed on.

    Grids are fixed beforehand from the weights (GPTQ's static groups), columns go in the order of their inputs' size
    (act-order), and all layers see full-precision inputs, as VQ4DiT's blocks do.
    """

    bits: int
    group_size: int | None
    moments: Moments

    def build(self, pipe: Pipeline, folder: Path | None = None) -> Baseline:
        hessians = input_hessians(pipe, self.moments.inputs, self.moments.batches)

        def quantized(name: str, layer: nn.Linear) -> Tensor:
            grid = fit_grid(layer.weight, self.bits, self.group_size)
            columns = Columns.of(hessians[name], 1)
            return quantize_columns(layer.weight, columns, lambda w, root, where: grid.round(w, where))

        return uniform(pipe.transformer, self.bits, self.group_size, quantized)


@dataclass(frozen=True)
class Grid:
    """2^b evenly spaced values from the least to the greatest weight of a group.

    ŵ = scale · (q − zero) with q in 0 … 2^bits − 1; scale and zero [out, groups], the scale exact in float16.
    """

    scale: Tensor
    zero: Tensor
    bits: int
    group_size: int

    def round(self, columns: Tensor, positions: Tensor) -> Tensor:
        """The nearest grid values of weight columns [out, c] that stand at `positions` [c] of the matrix."""
        group = positions // self.group_size
        scale, zero = self.scale[:, group], self.zero[:, group]  # [out, groups] -> [out, c]
        codes = (columns / scale + zero).round().clamp(0, 2**self.bits - 1)
        return scale * (codes - zero)


def fit_grid(weight: Tensor, bits: int, group_size: int | None = None) -> Grid:
    """The grid of `weight` [out, in]: each `group_size` inputs of a row have their own, None for one a row.

    Zero is always on the grid, as in torchao's affine quantization. Raises ValueError for bits outside 1 … 8.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits} is outside 1 … 8")
    out, inputs = weight.shape
    groups = weight.detach().float().reshape(out, -1, group_size or inputs)  # [out, groups, group_size]
    low, high = groups.amin(dim=2).clamp_max(0), groups.amax(dim=2).clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).half().float()
    scale = torch.where(scale > 0, scale, 1.0)  # a group of zeros
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    return Grid(scale, zero, bits, group_size or inputs)
