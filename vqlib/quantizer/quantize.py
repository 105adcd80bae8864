"""Weights -> codebooks -> candidates: a full-precision transformer becomes a student of `CandidateLinear` layers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from vqlib.config import VQConfig
from vqlib.models import structure
from vqlib.quantizer.candidates import find_candidates
from vqlib.quantizer.codebook import Codebook, fit_codebooks
from vqlib.quantizer.error_feedback import candidates_with_feedback, refit
from vqlib.quantizer.feedback import Columns
from vqlib.quantizer.soft import CandidateLinear
from vqlib.quantizer.subvectors import split
from vqlib.system.fingerprint import digest
from vqlib.system.settings import as_seed

_TOGETHER = 1 << 30  # bytes of weights whose k-means is made together; the peak is three times as much


def quantize(
    transformer: nn.Module,
    config: VQConfig,
    seed: int = 0,
    hessians: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A student of `transformer`: every linear of its blocks with a k-means codebook, candidates and starting ratios.

    Layers that `config.full_precision` names stay as they are. The original is left as it is; tensors that are not quantized
    are copied. `hessians`: [in, in] by layer name, as `input_hessians` gives them; only assignment="error-feedback" reads
    them, and a codebook that is the layer's own is then refitted to its assignments (ratios and order of the candidates are
    those before it). Raises ValueError naming the layer whose width `config.d` does not divide, or whose Hessian is missing,
    of another size or not finite, and a model that has no linear in its blocks or holds quantized layers already, before any
    work is done.
    """
    transformer = structure.unwrapped(transformer)
    return quantize_layers(transformer, fitting_layers(transformer, config), config, seed, hessians)


def quantize_layers(
    transformer: nn.Module,
    layers: dict[str, nn.Linear],
    config: VQConfig,
    seed: int = 0,
    hessians: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """`quantize` for these of the linears that `fitting_layers` gives, even none; ValueError of seed and Hessians alone."""
    hessians, seed = {} if hessians is None or config.assignment == "nearest" else hessians, as_seed("seed", seed)
    for name, layer in layers.items() if config.assignment != "nearest" else ():
        if name not in hessians:
            raise ValueError(
                f"assignment={config.assignment!r} needs hessians=vqlib.input_hessians(pipe), not given for {name}"
            )
        if hessians[name].shape != (layer.in_features, layer.in_features) or not hessians[name].isfinite().all():
            raise ValueError(
                f"in_features {layer.in_features} needs a finite Hessian of that size, "
                f"got {list(hessians[name].shape)} ({name})"
            )
    student = _copy_without(transformer, layers.values())
    columns_of = lru_cache(1)(Columns.of)  # q, k and v have the same inputs
    groups = _groups(transformer, layers, config)
    codewords = {label: book.codewords for label, book in codebooks(groups, config, seed)}
    for label, group in groups.items():
        own = config.for_layer(next(iter(group)))
        for name, replacement in _quantize_group(group, codewords[label], own, hessians, columns_of):
            structure.swap(student, name, replacement)
    inputs = getattr(hessians, "made_of", None)  # of `input_hessians`; of others their own bits
    if hessians and inputs is None:
        inputs = {"sha256": digest((name, hessians[name]) for name in layers)}
    student.quantized_with = config.to_dict() | {"seed": seed, "hessians": inputs}  # a calibration run belongs to it
    return student.eval()


PAST_THEIR_LAYERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # what reads the weights of linears it holds


def fitting_layers(transformer: nn.Module, config: VQConfig) -> dict[str, nn.Linear]:
    """The linears to quantize by name, checked before anything is computed.

    Raises ValueError where there is none, where some are quantized already, and naming a layer that k or d do not fit, one that
    stands in several places or that the module around it does not call, or a pattern that fits no layer.
    """
    found = structure.quantizable(transformer)
    config.require_used(found)
    layers = {name: layer for name, layer in found.items() if config.takes(name)}
    done = [name for name, module in transformer.named_modules() if hasattr(module, "codebook")]
    if done:
        raise ValueError(
            f"{len(done)} layers are quantized already, {done[0]} the first: give the full-precision model"
        )
    if not layers:
        left_out = f"full_precision={config.full_precision!r} leaves none of its {len(found)} linear layers"
        raise ValueError(f"{type(transformer).__name__}: {left_out}: nothing to quantize")
    places = Counter(id(child) for owner in transformer.modules() for child in owner._modules.values())
    for name, layer in layers.items():
        if places[id(layer)] > 1:
            raise ValueError(
                f"{name} stands in {places[id(layer)]} places of the model: give full_precision=({name!r},), or a linear each"
            )
    for name, module in structure.unwrapped(transformer).named_modules():
        inside = () if not isinstance(module, PAST_THEIR_LAYERS) else [n for n in layers if n.startswith(f"{name}.")]
        if inside:
            kind = f"a {type(module).__name__}, which reads weights itself and past their layers"
            raise ValueError(
                f"{inside[0]} is part of {name}, {kind}: give full_precision=('{name}.*',), or linears of its own"
            )
    for name, layer in layers.items():
        own = config.for_layer(name)
        count = len(split(layer.weight, own.d, name))
        for part, values in layer.named_parameters():
            bad = int((~values.isfinite()).sum())
            if bad:
                raise ValueError(f"{bad} of {values.numel()} values are not finite ({name}.{part})")
        if count < own.k and config.codebook_scope == "layer":
            raise ValueError(f"{count} sub-vectors are fewer than k={own.k} codewords ({name})")
    return layers


Group = dict[str, nn.Linear]  # layers that share a codebook, by name


def _groups(transformer: nn.Module, layers: dict[str, nn.Linear], config: VQConfig) -> dict[str, Group]:
    """The layers that share a codebook, under what messages call them: each alone, or all of a block or of the model that have the same k and d."""
    owner = {module: i for i, block in enumerate(structure.block_list(transformer)) for module in block.modules()}
    groups: dict[tuple, Group] = {}
    for name, layer in layers.items():
        own, scope = config.for_layer(name), {"layer": name, "block": owner[layer], "model": ""}[config.codebook_scope]
        groups.setdefault((scope, own.k, own.d), {})[name] = layer
    return {next(iter(g)) if len(g) == 1 else f"{next(iter(g))} … ({len(g)} layers)": g for g in groups.values()}


def codebooks(groups: Mapping[str, Group], config: VQConfig, seed: int = 0) -> Iterator[tuple[str, Codebook]]:
    """A codebook for each group's sub-vectors, every layer divided by its scale where it is shared; in any order.

    On a GPU groups of one size are fitted together, `_TOGETHER` bytes of float32 weights at most.
    """
    shared, options = config.codebook_scope != "layer", {"seed": seed, "iterations": config.kmeans_iterations}
    for (k, d), labels in _alike(groups, config):
        parts = {}
        for label in labels:
            own = [_normalized(layer, d, _scale(layer) if shared else None) for layer in groups[label].values()]
            parts[label] = own[0] if len(own) == 1 else torch.cat(own)
        yield from fit_codebooks(parts, k, **options).items()


def _alike(groups: Mapping[str, Group], config: VQConfig) -> Iterable[tuple[tuple[int, int], list[str]]]:
    """(k, d) and the labels of groups that are fitted together: on the CPU, where nothing is launched, each alone."""
    found: dict[tuple, list[str]] = {}
    for label, group in groups.items():
        own, first = config.for_layer(next(iter(group))), next(iter(group.values())).weight
        weights = sum(layer.weight.numel() for layer in group.values())
        most = 1 if first.device.type == "cpu" else max(1, _TOGETHER // (4 * weights))
        found.setdefault((own.k, own.d, first.device, weights, most), []).append(label)
    return (
        ((k, d), same[i : i + most]) for (k, d, _, _, most), same in found.items() for i in range(0, len(same), most)
    )


def _quantize_group(
    group: Group,
    codewords: Tensor,
    config: VQConfig,
    hessians: Mapping[str, Tensor],
    columns_of: Callable[[Tensor, int], Columns],
) -> Iterator[tuple[str, CandidateLinear]]:
    """The new layers of a group, by name, with its codewords [k, d] and settings."""
    shared, codewords = config.codebook_scope != "layer", nn.Parameter(codewords)
    for name, layer in group.items():
        scale = _scale(layer) if shared else None
        part = _normalized(layer, config.d, scale)
        if hessians:
            weight, hessian = part.view(layer.weight.shape), hessians[name].to(part.device)
            columns = columns_of(hessian, config.d)
            candidates = candidates_with_feedback(
                weight, columns, codewords.data, config.candidates, config.ratio_start
            )
            if not shared:
                codewords.data = refit(weight, hessian, candidates.indices[:, 0].long(), codewords.data)
        else:
            candidates = find_candidates(part, codewords.data, config.candidates, config.ratio_start)
        shape, dtype = tuple(layer.weight.shape), getattr(torch, config.codebook_dtype)
        yield name, CandidateLinear(codewords, candidates, shape, layer.bias, scale, dtype)


def _scale(layer: nn.Linear) -> Tensor:
    return layer.weight.detach().double().pow(2).mean().sqrt().float()  # in float64 threads split no digit that is kept


def _normalized(layer: nn.Linear, d: int, scale: Tensor | None) -> Tensor:
    x = split(layer.weight.detach().float(), d)
    return x if scale is None else x / torch.where(scale > 0, scale, 1.0)  # a layer of zeros: 0 · any codeword


def _copy_without(module: nn.Module, replaced) -> nn.Module:
    """A deep copy in which the modules about to be replaced are shared, not copied: no second set of large weights."""
    return copy.deepcopy(module, {id(layer): layer for layer in replaced})
