"""Round-to-nearest: every weight on the nearest value of its group's uniform grid, by torchao (extra `baselines`)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vqlib.models.pipeline import Pipeline
from vqlib.studies.baselines.baseline import Baseline, uniform


@dataclass(frozen=True)
class RoundToNearest:
    """torchao's affine weight-only quantization of every block Linear, `group_size` inputs a scale (None: a row).

    Scales are float16 and zero points b-bit integers, the weights kept dense. Raises ValueError for bits outside 2 … 8.
    """

    bits: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} is outside 2 … 8, which torchao knows")

    def build(self, pipe: Pipeline, folder: Path | None = None) -> Baseline:
        """Raises ModuleNotFoundError without torchao, ValueError for a group size that does not divide a layer's width."""
        torchao = _torchao()
        config = torchao.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{self.bits}"),
            granularity=torchao.PerGroup(self.group_size) if self.group_size else torchao.PerAxis(0),
            mapping_type=torchao.MappingType.ASYMMETRIC,
            scale_dtype=torch.float16,
        )

        def quantized(name: str, layer: nn.Linear) -> Tensor:
            shape = {"bias": False, "device": layer.weight.device}
            holder = nn.Sequential(nn.Linear(layer.in_features, layer.out_features, **shape))
            holder[0].weight = nn.Parameter(layer.weight.detach().float().clone(), requires_grad=False)
            torchao.quantize_(holder, config)
            return holder[0].weight.dequantize()

        return uniform(pipe.transformer, self.bits, self.group_size, quantized)


def _torchao():
    try:
        return importlib.import_module("torchao.quantization")
    except ModuleNotFoundError:
        raise ModuleNotFoundError("round-to-nearest rows need torchao: pip install 'vqlib[baselines]'") from None
