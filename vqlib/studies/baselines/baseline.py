"""A transformer of one method, however it was made, and what it takes to store."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vqlib.models import dit
from vqlib.packed import container
from vqlib.packed.checkpoint import size_report


@dataclass(frozen=True, eq=False)
class Baseline:
    """A transformer of one method and what it takes to store.

    bits_per_weight: of the quantized linears' weights, with codebooks or float16 scales and zero points; size_bytes:
    the whole transformer with that, every other tensor in float16 and copies once.
    """

    method: str
    model: nn.Module
    bits_per_weight: float
    size_bytes: int
    settings: Mapping[str, Any] = field(default_factory=dict)


def full_precision(transformer: nn.Module) -> Baseline:
    """The model as it is: 16 bits where float16 holds every weight exactly, else 32."""
    weights = [layer.weight for layer in dit.quantizable(transformer).values()]
    exact = all(torch.equal(weight, weight.half().to(weight.dtype)) for weight in weights)
    stored = _stored_bytes(transformer, "float16" if exact else "float32")
    return Baseline("full precision", transformer, 16.0 if exact else 32.0, sum(stored.values()))


def packed(method: str, model: nn.Module, settings: Mapping[str, Any] | None = None) -> Baseline:
    """A transformer of `VQLinear` layers, counted as its checkpoint stores it."""
    sizes = size_report(model).attrs
    return Baseline(method, model, sizes["bits_per_weight"], sizes["tensor_bytes"], settings or {})


def uniform(method: str, model: nn.Module, bits: int, group_size: int | None, settings: Mapping[str, Any]) -> Baseline:
    """Dense weights on a b-bit grid: b bits a weight, a float16 scale and a b-bit zero point a group (None: a row)."""
    layers = dit.quantizable(model)
    count = sum(layer.weight.numel() for layer in layers.values())
    groups = sum(layer.weight.numel() // (group_size or layer.in_features) for layer in layers.values())
    quantized_bits = bits * count + (16 + bits) * groups
    stored = _stored_bytes(model, "float16", without={f"{name}.weight" for name in layers})
    settings = {"bits": bits, "group_size": group_size, **settings}
    return Baseline(method, model, quantized_bits / count, sum(stored.values()) + quantized_bits // 8, settings)


def replace_weights(
    transformer: nn.Module, group_size: int | None, quantized: Callable[[str, nn.Linear], Tensor]
) -> nn.Module:
    """A copy in which every quantizable layer has the weight [out, in] that `quantized(name, layer)` gives.

    Raises ValueError naming a layer whose width `group_size` does not divide, before any work is done.
    """
    for name, layer in dit.quantizable(transformer).items():
        if group_size is not None and (group_size < 1 or layer.in_features % group_size):
            raise ValueError(f"in_features {layer.in_features} is not divisible by group_size={group_size} ({name})")
    copied = copy.deepcopy(transformer)
    for name, layer in dit.quantizable(copied).items():
        weight = quantized(name, layer).to(layer.weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return copied.eval()


def _stored_bytes(model: nn.Module, storage: str, without: set[str] = frozenset()) -> dict[str, int]:
    """Bytes of every tensor a checkpoint holds, as `container` stores them."""
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in without}
    stored, _ = container.encode(state, storage, "")
    return {name: tensor.numel() * tensor.element_size() for name, tensor in stored.items()}
