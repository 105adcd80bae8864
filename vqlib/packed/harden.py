"""Soft -> hard: the candidates with the highest ratio become assignments, and layers become packed ones; and back."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from vqlib.models import structure
from vqlib.packed.checkpoint import attach, stored_in
from vqlib.packed.layer import VQLinear
from vqlib.quantizer.candidates import Candidates, index_dtype
from vqlib.quantizer.soft import CandidateLinear, soft_layers
from vqlib.system.fingerprint import digest


def harden(student: nn.Module, storage: str | None = None) -> nn.Module:
    """The packed transformer: the candidates with the highest ratio become assignments. Shared codebooks stay shared.

    A diffusers model comes back attached (`checkpoint.attach`): `save_pretrained` writes it as it is. All that is no code,
    codebook or scale is rounded to `storage`, "float16" or "float32", which rounds nothing; by default to what the packed
    model had from which the student was softened, else float16. The student stays as it is.
    """
    student = structure.unwrapped(student)
    soft = soft_layers(student)
    packed = copy.deepcopy(student, {id(layer): layer for layer in soft.values()})  # soft layers shared, not copied
    codebooks: dict[int, Tensor] = {}
    for name, layer in soft.items():
        if id(layer.codebook) not in codebooks:
            codebooks[id(layer.codebook)] = _as_stored(layer, name)
        structure.swap(packed, name, harden_layer(layer, name, codebooks[id(layer.codebook)]))
    packed = packed.eval().requires_grad_(False)
    return attach(packed, storage=stored_in(student, storage)) if soft and isinstance(packed, ModelMixin) else packed


def harden_layer(layer: CandidateLinear, name: str, codewords: Tensor | None = None) -> VQLinear:
    """The packed layer in which every sub-vector takes its winner; `codewords` [k, d] lets layers share one codebook.

    ValueError with the layer's `name` where a codeword does not fit into the type it is stored in.
    """
    codewords = _as_stored(layer, name) if codewords is None else codewords
    scale = 1.0 if layer.scale is None else layer.scale.detach()
    shape = layer.out_features, layer.in_features
    return VQLinear.from_assignments(layer.assignments(), codewords, shape, layer.bias, scale)


def soften(packed: nn.Module) -> nn.Module:
    """A student whose assignments are those of the packed transformer: codebooks, scales and biases can be trained again.

    Every layer has one candidate a sub-vector. Shared codebooks stay shared, wherever the model was moved since; `harden` is
    the inverse. A run over the student belongs to these codes, codebooks and scales, made here or loaded.
    """
    packed = structure.unwrapped(packed)
    layers = {name: layer for name, layer in packed.named_modules() if isinstance(layer, VQLinear)}
    student = copy.deepcopy(packed, {id(layer): layer for layer in layers.values()})
    codebooks: dict[Hashable, nn.Parameter] = {}
    for name, layer in layers.items():
        book = codebooks.setdefault(_shared_by(packed, layer), nn.Parameter(layer.codebook.float().clone()))
        codes = layer.assignments().unsqueeze(1)  # [N] -> [N, 1]
        candidates = Candidates(codes.to(index_dtype(layer.k)), torch.zeros(codes.shape, device=codes.device))
        scale = layer.scale if layer.scale.item() != 1.0 else None
        shape = layer.out_features, layer.in_features
        structure.swap(student, name, CandidateLinear(book, candidates, shape, layer.bias, scale, layer.codebook.dtype))
    student.quantized_with = {"sha256": _codes_sha256(layers)}
    return student.eval()


def _codes_sha256(layers: Mapping[str, VQLinear]) -> str:
    """Of codes, codebooks and scales, which a file keeps as they are (biases it may round): what tells one start from another."""
    parts = ((f"{name}.{key}", t) for name, layer in layers.items() for key, t in layer.state_dict().items())
    return digest((name, t) for name, t in parts if not name.endswith(".bias"))


def _shared_by(packed: nn.Module, layer: VQLinear) -> Hashable:
    """What layers of one codebook have in common: the tensor or, as moving a model gives every layer one of its own, its values."""
    known = getattr(packed, "hf_quantizer", None)
    scope = known.quantization_config.config.codebook_scope if known else None
    if scope is None:
        return id(layer.codebook)
    return id(layer) if scope == "layer" else digest([("", layer.codebook)])


def _as_stored(layer: CandidateLinear, name: str) -> Tensor:
    """A copy of the codebook [k, d] in the type it is stored in. Raises ValueError where that does not hold its values."""
    codewords = layer.codebook.detach().clone().to(layer.codebook_dtype)
    if not codewords.isfinite().all():
        largest = layer.codebook.detach().abs().max().item()
        raise ValueError(f"{name}: a codeword of {largest:g} does not fit into {layer.codebook_dtype}")
    return codewords


def reconstruction_error(weight: Tensor, layer: VQLinear) -> float:
    """‖W − Ŵ‖² / ‖W‖², the relative squared error of one layer's weight [out, in]."""
    return ((weight - layer.weight()).pow(2).sum() / weight.pow(2).sum()).item()
