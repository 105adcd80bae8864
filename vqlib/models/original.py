"""The original DiT's weights (`DiT-XL-2-256x256.pt`) as a diffusers transformer: names, fused q, k, v, embedders.

The file is a state dict, or a checkpoint that holds one under whatever names and prefixes (`ema.`, `state_dict.`,
`module.`, …), of several the moving average; it is read with `weights_only=True`.
The result computes what diffusers computes from the same weights. That is not exactly the original's function:
diffusers' DiT spaces its timestep frequencies by 127 where the original has 128, and its second LayerNorm adds 1e-5
where the original has 1e-6.
"""

from __future__ import annotations

import argparse
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import DiTTransformer2DModel
from torch import Tensor

# hidden size -> (length of one attention head, blocks) of the published models: S, B, L, XL
PUBLISHED = {384: (64, 12), 768: (64, 12), 1024: (64, 24), 1152: (72, 28)}
HEAD = 64  # of any other hidden size
FIRST = "x_embedder.proj.weight"  # the key by which a DiT is found, under whatever names a checkpoint holds it
BLOCK = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}


def read_transformer(path: str | Path) -> DiTTransformer2DModel:
    """The transformer of an original `.pt` file, float32, every block with its own copy of the embedders.

    Raises FileNotFoundError, and ValueError for what is not a DiT's state dict: with the first key that is missing,
    misshapen (both shapes) or unknown.
    """
    path = Path(path).expanduser()
    weights = _read(path)
    config = _config(weights, path)
    with init_empty_weights():  # the position table is a buffer and stays real
        transformer = DiTTransformer2DModel(**config)
    names = key_map(config["num_layers"])
    expected = transformer.state_dict()
    _check(weights, {key: _shape(key, new, expected) for key, new in names.items()}, path)
    _check_positions(weights["pos_embed"], transformer.pos_embed.pos_embed, path)
    converted: dict[str, Tensor] = {}
    for key, new in names.items():
        parts = weights[key].chunk(3) if _fused(key) else [weights[key]] * len(new)
        converted |= {name: part.to(torch.float32, copy=True) for name, part in zip(new, parts, strict=True)}
    transformer.load_state_dict(converted, assign=True)
    return transformer.eval().requires_grad_(False)


def key_map(depth: int) -> dict[str, tuple[str, ...]]:
    """Original key -> its diffusers names, for `depth` blocks: three for a fused q, k, v, one a block for an embedder."""
    names: dict[str, tuple[str, ...]] = {}
    for kind in ("weight", "bias"):
        names |= {f"{old}.{kind}": (f"{new}.{kind}",) for old, new in ENDS.items()}
    copies = [f"transformer_blocks.{i}.norm1.emb" for i in range(depth)]
    names |= {old: tuple(f"{copy}.{new}" for copy in copies) for old, new in EMBEDDERS.items()}
    for i in range(depth):
        for old, new in BLOCK.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{i}.{old}.{kind}"] = tuple(f"transformer_blocks.{i}.{part}.{kind}" for part in new)
    return names


def _read(path: Path) -> Mapping[str, Tensor]:
    """The state dict of a file. The argparse settings of a training checkpoint, a harmless type, are let in."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever torch stumbles over, the file is at fault
        raise ValueError(f"{path} cannot be read as weights ({str(error).splitlines()[0]})") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict of tensors")
    weights = _chosen(dict(_state_dicts(content)), path)
    for key, value in weights.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{path}: {key} is {kind}, expected a tensor of floats")
    return weights


def _state_dicts(content: Mapping, name: str = "", depth: int = 5) -> Iterator[tuple[str, dict]]:
    """Every DiT in a checkpoint, by the names and prefixes it is found under, which its keys are then without."""
    for key, value in content.items():
        if isinstance(value, Mapping) and depth:
            yield from _state_dicts(value, f"{name}{key}.", depth - 1)
        elif f".{key}".endswith(f".{FIRST}"):
            prefix = str(key).removesuffix(FIRST)
            yield name + prefix, {str(k)[len(prefix) :]: v for k, v in content.items() if str(k).startswith(prefix)}


def _chosen(found: dict[str, dict], path: Path) -> dict:
    """The one there is, or the moving average, which DiT samples with."""
    average = [name for name in found if "ema" in re.split(r"[._]", name.lower())]
    names = average if len(found) > 1 else list(found)
    if not found:
        raise ValueError(f"{path} is not a DiT's state dict: {FIRST} is missing")
    if len(names) != 1:
        raise ValueError(f"{path} holds several models ({', '.join(found)}): which one is meant is not known")
    return found[names[0]]


def _config(weights: Mapping[str, Tensor], path: Path) -> dict:
    """The arguments of DiTTransformer2DModel that the shapes tell; the length of a head is known by the hidden size."""
    kernel = _get(weights, FIRST, 4, path)  # [hidden, channels, patch, patch]
    hidden, channels, patch = kernel.shape[:3]
    head, published_depth = PUBLISHED.get(hidden, (HEAD, None))
    if hidden % head:
        raise ValueError(f"{path}: hidden size {hidden} is not divisible into heads of {head}")
    found = [int(match[1]) for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))]
    depth = published_depth or 1 + max(found, default=0)
    side = math.isqrt(_get(weights, "pos_embed", 3, path).shape[1])  # [1, tokens, hidden]
    return {
        "num_attention_heads": hidden // head,
        "attention_head_dim": head,
        "in_channels": channels,
        "out_channels": len(_get(weights, "final_layer.linear.weight", 2, path)) // patch**2,
        "num_layers": depth,
        "sample_size": side * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": len(_get(weights, "y_embedder.embedding_table.weight", 2, path)) - 1,
    }


def _get(weights: Mapping[str, Tensor], key: str, dimensions: int, path: Path) -> Tensor:
    if key not in weights:
        raise ValueError(f"{path} is not a DiT's state dict: {key} is missing")
    if weights[key].ndim != dimensions or not weights[key].numel():
        raise ValueError(f"{path}: {key} is {list(weights[key].shape)}, expected {dimensions} dimensions")
    return weights[key]


def _fused(key: str) -> bool:
    return ".attn.qkv." in key


def _shape(key: str, names: tuple[str, ...], expected: Mapping[str, Tensor]) -> list[int]:
    shape = list(expected[names[0]].shape)
    return [3 * shape[0], *shape[1:]] if _fused(key) else shape


def _check(weights: Mapping[str, Tensor], shapes: Mapping[str, list[int]], path: Path) -> None:
    for key, shape in shapes.items():
        found = list(weights[key].shape) if key in weights else None
        if found is None:
            raise ValueError(f"{path}: {key} {shape} is missing")
        if found != shape:
            raise ValueError(f"{path}: {key} is {found}, expected {shape}")
    unknown = next((key for key in weights if key not in shapes and key != "pos_embed"), None)
    if unknown:
        raise ValueError(f"{path}: {unknown} {list(weights[unknown].shape)} belongs to no DiT of {len(shapes)} tensors")


def _check_positions(table: Tensor, expected: Tensor, path: Path) -> None:
    """The position table is computed, not loaded; the file's must be the same sines."""
    if table.shape != expected.shape:
        raise ValueError(f"{path}: pos_embed is {list(table.shape)}, expected {list(expected.shape)}")
    if not torch.allclose(table.float(), expected, atol=1e-2):
        raise ValueError(f"{path}: pos_embed is not DiT's table of sines and cosines")
