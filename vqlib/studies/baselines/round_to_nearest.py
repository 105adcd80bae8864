"""Round-to-nearest: every weight on the nearest value of its group's uniform grid, by torchao (extra `baselines`)."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn

from vqlib.models.pipeline import Pipeline
from vqlib.studies.baselines.baseline import Baseline, replace_weights, uniform


def round_to_nearest(pipe: Pipeline, bits: int, group_size: int | None = None) -> Baseline:
    """torchao's affine weight-only quantization of every block Linear, `group_size` inputs a scale (None: a row).

    Scales are float16 and zero points b-bit integers, the weights kept dense. Raises ModuleNotFoundError where torchao
    is missing, ValueError for bits outside 2 … 8 and for a group size that does not divide a layer's width.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} is outside 2 … 8, which torchao knows")
    torchao = _torchao()
    granularity = torchao.PerGroup(group_size) if group_size else torchao.PerAxis(0)
    config = torchao.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=granularity,
        mapping_type=torchao.MappingType.ASYMMETRIC,
        scale_dtype=torch.float16,
    )

    def quantized(name: str, layer: nn.Linear) -> Tensor:
        holder = nn.Sequential(nn.Linear(layer.in_features, layer.out_features, bias=False, device=layer.weight.device))
        holder[0].weight = nn.Parameter(layer.weight.detach().float().clone(), requires_grad=False)
        torchao.quantize_(holder, config)
        return holder[0].weight.dequantize()

    model = replace_weights(pipe.transformer, group_size, quantized)
    return uniform("RTN", model, bits, group_size, {"library": "torchao"})


def _torchao():
    try:
        return importlib.import_module("torchao.quantization")
    except ModuleNotFoundError:
        raise ModuleNotFoundError("round-to-nearest rows need torchao: pip install 'vqlib[baselines]'") from None
