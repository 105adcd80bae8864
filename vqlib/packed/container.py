"""The packed checkpoint, format 1: what is in the file, and how every byte of it is checked before it is used.

A checkpoint is a folder of two files, in diffusers' layout:

`config.json`: the model's class name and config, and `quantization_config` with quant_method "vq4dit", the format
version, k, d, codebook scope, storage dtype and provenance (JSON written by the caller: source, recipe, seeds, …).

`diffusion_pytorch_model.safetensors`: for each quantized layer NAME
    NAME.codes     uint8 [ceil(N·ceil(log2 k)/8)], the bit stream of `vqlib.kernels.bits`
    NAME.codebook  float32, float16 or bfloat16 [k, d], as the layer holds it
    NAME.scale     float32 []; absent where it is 1
    NAME.bias      [out], absent where the layer has none
and every other tensor of the model's state dict. float32 tensors other than codebooks and scales are stored as
float16 (storage="float32" keeps them; a tensor whose values leave float16's range is kept as it is). Tensors with
equal bytes (DiT's copies of its embedders, a shared codebook) are stored once: the copies are named under `aliases`.

The safetensors metadata holds `vqlib`, a JSON manifest {format, config, tensors, aliases}, and `vqlib_sha256`, its
SHA-256. `tensors` maps each stored name to the SHA-256 of "dtype:shape:" and its bytes; `config` is the SHA-256 of
config.json's meaning (class, settings, quantization_config; keys with a leading underscore do not count). Checksums
find damage and mistakes; they are not a signature.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vqlib.kernels.bits import CHUNK, bits_for, unpack_range
from vqlib.packed.header import FORMAT, NAMES, CheckpointError, Header, sha256


def encode(state: Mapping[str, Tensor], storage: str, config: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A packed model's state dict as stored tensors and safetensors metadata. Raises ValueError on NaN or infinity."""
    layers = {name.removesuffix(".codes") for name in state if name.endswith(".codes")}
    stored, digests, aliases, first = {}, {}, {}, {}
    for name, tensor in state.items():
        value = _stored(name, tensor, layers, storage)
        if value is None:
            continue
        digest = _digest(value)
        source = name if name.endswith(".codes") else first.setdefault(digest, name)
        if source != name:
            aliases[name] = source
        else:
            stored[name], digests[name] = value, digest
    manifest = json.dumps(
        {"format": FORMAT, "config": config, "tensors": digests, "aliases": aliases}, separators=(",", ":")
    )
    return stored, {"format": "pt", "vqlib": manifest, "vqlib_sha256": sha256(manifest.encode())}


def decode(state: Mapping[str, Tensor], header: Header, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Stored tensors, checked against the manifest, as the whole state dict; copies share one tensor.

    dtypes: what each name is wanted in. Raises CheckpointError on a wrong checksum, code or codeword.
    """
    for name in header.entries:
        if name not in state or _digest(state[name]) != header.digests[name]:
            raise CheckpointError(header.file, name, "its bytes do not have the checksum that was saved with them")
        if name.endswith(".codebook") and not bool(state[name].isfinite().all()):
            raise CheckpointError(header.file, name, "holds NaN or infinity")
        if name.endswith(".codes"):
            _require_codes_below(state[name], header, name)
    full, cast = {}, {}
    for name in header.names():
        source, dtype = header.aliases.get(name, name), dtypes[name]
        if source not in state:
            full[name] = torch.ones((), dtype=torch.float32)
            continue
        # One conversion for all copies, or 28 embedders that are one on disk would be 28 in memory. And a real copy:
        # what was read is a view of the mapped file, which may change under us and is not aligned, so that
        # sums in a matrix product would be taken in another order than they were before saving.
        if (source, dtype) not in cast:
            wanted = dtype if state[source].is_floating_point() else state[source].dtype
            cast[source, dtype] = state[source].to(wanted, copy=True)
        full[name] = cast[source, dtype]
    return full


def config_digest(class_name: str, config: Mapping[str, Any], quantization: Mapping[str, Any]) -> str:
    """SHA-256 of what a config means: class, settings and quantization; keys with a leading underscore are notes."""
    settings = {k: v for k, v in config.items() if not k.startswith("_") and k != "quantization_config"}
    meaning = {"class": class_name, "settings": settings, "quantization": quantization}
    return sha256(json.dumps(meaning, sort_keys=True, default=str).encode())


def align(model: nn.Module) -> nn.Module:
    """Copy, in place, tensors that lie off a 64-byte boundary: views of a mapped file, whose sums round differently."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return model


def round_for_storage(model: nn.Module) -> nn.Module:
    """Round, in place, every tensor that `encode` stores as float16, so that model and file are bit-equal."""
    layers = {name.removesuffix(".codes") for name, _ in model.named_buffers() if name.endswith(".codes")}
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            value = _stored(name, tensor.detach(), layers, "float16")
            if value is not None and value.dtype != tensor.dtype:
                tensor.copy_(value)
    return model


def _stored(name: str, tensor: Tensor, layers: set[str], storage: str) -> Tensor | None:
    """A tensor as the file holds it; None where the file leaves it out."""
    layer, _, part = name.rpartition(".")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity; a checkpoint of it would be useless")
    if layer in layers and part == "scale":
        return None if float(tensor) == 1.0 else tensor.to(torch.float32)
    if tensor.dtype != torch.float32 or storage == "float32" or (layer in layers and part == "codebook"):
        return tensor
    half = tensor.to(torch.float16)
    return half if bool(half.isfinite().all()) else tensor


def _digest(tensor: Tensor) -> str:
    label = f"{NAMES[tensor.dtype]}:{list(tensor.shape)}:".encode()
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return sha256(label, data)


def _require_codes_below(codes: Tensor, header: Header, name: str) -> None:
    """Every code names a codeword; nothing to check where k is a power of two."""
    k = header.find(f"{name.removesuffix('.codes')}.codebook").shape[0]
    bits = bits_for(k)
    if k == 1 << bits:
        return
    count = codes.numel() * 8 // bits  # padding bits are 0, so a code made of them is 0 as well
    for start in range(0, count, CHUNK):
        worst = int(unpack_range(codes, bits, start, min(start + CHUNK, count)).max())
        if worst >= k:
            raise CheckpointError(header.file, name, f"code {worst} names no codeword: k={k}")
