"""GPTQ (Frantar et al. 2023) without data: uniform grids, Hessians from the model's own trajectory."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from vqlib.models.pipeline import Pipeline
from vqlib.quantizer.feedback import Columns, quantize_columns
from vqlib.studies.baselines.baseline import Baseline, replace_weights, uniform
from vqlib.studies.baselines.grid import fit_grid


def gptq(pipe: Pipeline, bits: int, hessians: Mapping[str, Tensor], group_size: int | None = 64) -> Baseline:
    """Every block Linear column by column on its grid, the error passed on; `hessians` as `input_hessians` gives them.

    Grids are fixed beforehand from the weights (GPTQ's static groups), columns go in the order of their inputs' size
    (act-order), and all layers see full-precision inputs, as VQ4DiT's blocks do.
    """

    def quantized(name: str, layer: nn.Linear) -> Tensor:
        grid = fit_grid(layer.weight, bits, group_size)
        return quantize_columns(
            layer.weight, Columns.of(hessians[name], 1), lambda w, root, where: grid.round(w, where)
        )

    return uniform("GPTQ", replace_weights(pipe.transformer, group_size, quantized), bits, group_size, {})
