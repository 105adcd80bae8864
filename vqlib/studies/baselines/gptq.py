"""GPTQ (Frantar et al. 2023) without data: uniform grids, Hessians from the model's own trajectory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from vqlib.calibrator.hessians import input_hessians
from vqlib.models.pipeline import Pipeline
from vqlib.quantizer.feedback import Columns, quantize_columns
from vqlib.studies.baselines.baseline import Baseline, Moments, uniform
from vqlib.studies.baselines.grid import fit_grid


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
