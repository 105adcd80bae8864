"""A transformer of one method, however it was made, and what it takes to store."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vqlib.calibrator.hessians import BATCHES
from vqlib.config import CalibrationConfig
from vqlib.models import structure
from vqlib.models.pipeline import Pipeline
from vqlib.packed import container
from vqlib.packed.checkpoint import size_report


@dataclass(frozen=True, eq=False)
class Baseline:
    """A transformer of one method and what it takes to store.

    bits_per_weight: of the quantized linears' weights, with codebooks or float16 scales and zero points; size_bytes:
    the whole transformer with that, every other tensor in float16 and copies once; seconds: of training iterations.
    """

    model: nn.Module
    bits_per_weight: float
    size_bytes: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Moments:
    """Second moments of the layers' inputs: of how many batches on which calibration's trajectory."""

    inputs: CalibrationConfig
    batches: int = BATCHES


@dataclass(frozen=True)
class FullPrecision:
    """The model as it is: 16 bits where float16 holds every weight exactly, else 32."""

    def build(self, pipe: Pipeline, folder: Path | None = None) -> Baseline:
        weights = [layer.weight for layer in structure.quantizable(pipe.transformer).values()]
        bits = 16 if all(torch.equal(weight, weight.half().to(weight.dtype)) for weight in weights) else 32
        return Baseline(
            pipe.transformer, float(bits), stored_bytes(structure.unwrapped(pipe.transformer), f"float{bits}")
        )


def packed(model: nn.Module, seconds: float = 0.0) -> Baseline:
    """A transformer of `VQLinear` layers, counted as its checkpoint stores it."""
    sizes = size_report(model).attrs
    return Baseline(model, sizes["bits_per_weight"], sizes["tensor_bytes"], seconds)


def uniform(
    transformer: nn.Module, bits: int, group_size: int | None, quantized: Callable[[str, nn.Linear], Tensor]
) -> Baseline:
    """A copy in which every quantizable layer has the weight [out, in] on a b-bit grid that `quantized(name, layer)` gives.

    Stored are b bits a weight, a float16 scale and a b-bit zero point a group of inputs (None: a row). Raises ValueError
    naming a layer whose width `group_size` does not divide, before any work is done.
    """
    for name, layer in structure.quantizable(transformer).items():
        if group_size is not None and (group_size < 1 or layer.in_features % group_size):
            raise ValueError(f"in_features {layer.in_features} is not divisible by group_size={group_size} ({name})")
    model = copy.deepcopy(structure.unwrapped(transformer)).eval()
    layers = structure.quantizable(model)
    for name, layer in layers.items():
        layer.weight = nn.Parameter(quantized(name, layer).to(layer.weight.dtype), requires_grad=False)
    count = sum(layer.weight.numel() for layer in layers.values())
    groups = sum(layer.weight.numel() // (group_size or layer.in_features) for layer in layers.values())
    stored = bits * count + (16 + bits) * groups
    rest = stored_bytes(model, "float16", without={f"{name}.weight" for name in layers})
    return Baseline(model, stored / count, rest + stored // 8)


def stored_bytes(model: nn.Module, storage: str, without: set[str] = frozenset()) -> int:
    """Bytes of the tensors a checkpoint holds, as `container` stores them."""
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in without}
    return sum(tensor.numel() * tensor.element_size() for tensor in container.encode(state, storage, "")[0].values())
