"""Soft -> hard: the candidates with the highest ratio become assignments, and layers become packed ones."""

from __future__ import annotations

import copy

from diffusers import ModelMixin
from torch import Tensor, nn

from vqlib.models import dit
from vqlib.packed.checkpoint import attach
from vqlib.packed.layer import VQLinear
from vqlib.quantizer.soft import CandidateLinear, soft_layers


def harden(student: nn.Module) -> nn.Module:
    """The packed transformer: the candidates with the highest ratio become assignments. Shared codebooks stay shared.

    A diffusers model comes back attached (`checkpoint.attach`): `save_pretrained` writes it as it is.
    """
    student = dit.unwrapped(student)
    soft = soft_layers(student)
    packed = copy.deepcopy(student, {id(layer): layer for layer in soft.values()})  # soft layers shared, not copied
    codebooks: dict[int, Tensor] = {}
    for name, layer in soft.items():
        codewords = codebooks.setdefault(id(layer.codebook), layer.codebook.detach().clone())
        dit.swap(packed, name, harden_layer(layer, codewords))
    packed = packed.eval().requires_grad_(False)
    return attach(packed) if soft and isinstance(packed, ModelMixin) else packed


def harden_layer(layer: CandidateLinear, codewords: Tensor | None = None) -> VQLinear:
    """The packed layer in which every sub-vector takes its winner; `codewords` [k, d] lets layers share one codebook."""
    codewords = layer.codebook.detach().clone() if codewords is None else codewords
    scale = 1.0 if layer.scale is None else layer.scale.detach()
    shape = layer.out_features, layer.in_features
    return VQLinear.from_assignments(layer.assignments(), codewords, shape, layer.bias, scale)


def reconstruction_error(weight: Tensor, layer: VQLinear) -> float:
    """‖W − Ŵ‖² / ‖W‖², the relative squared error of one layer's weight [out, in]."""
    return ((weight - layer.weight()).pow(2).sum() / weight.pow(2).sum()).item()
