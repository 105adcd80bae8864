"""Packed checkpoints: a calibrated transformer as a small folder, checked as a whole before it is used.

`save` writes what `save_pretrained` writes, atomically; `load_transformer` reads what `from_pretrained` reads, and
checks config, header and sizes before diffusers sees the folder. The format is described in `vqlib.packed.container`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pandas as pd
import torch
from diffusers import ModelMixin
from torch import nn

from vqlib.config import VQConfig
from vqlib.models import structure
from vqlib.models.pipeline import device_of
from vqlib.packed import container
from vqlib.packed.diffusers_backend import Method, PackedConfig, VQQuantizer, packed_layers
from vqlib.packed.header import FORMAT, WEIGHTS, CheckpointError, parse_json, read_header, require_plausible
from vqlib.packed.layer import VQLinear
from vqlib.system.folders import recover_folder, write_folder

__all__ = ["CheckpointError", "attach", "load_transformer", "save", "size_report"]
CONFIG = "config.json"
CONFIG_LIMIT = 16 << 20  # bytes


def attach(
    model: ModelMixin, provenance: Mapping[str, Any] | None = None, storage: str = "float16", scope: str | None = None
) -> ModelMixin:
    """Make a transformer of `VQLinear` layers one that diffusers knows as quantized, in place; returns it.

    Afterwards `save_pretrained` and `dequantize` work, and tensors that the file holds as float16 are rounded to it, so
    the file and the model are bit-equal. Raises ValueError where nothing is packed or the model is not diffusers'.
    """
    layers = packed_layers(model)
    if not isinstance(model, ModelMixin) or not layers:
        raise ValueError(f"{type(model).__name__} has {len(layers)} packed layers; a packed diffusers model is needed")
    k, d = Counter((layer.k, layer.d) for layer in layers.values()).most_common(1)[0][0]
    others = tuple((name, layer.k, layer.d) for name, layer in layers.items() if (layer.k, layer.d) != (k, d))
    codes = VQConfig(k=k, d=d, codebook_scope=scope or _scope(layers), layers=others, candidates=1)
    config = PackedConfig(codes, storage, provenance)
    quantizer = VQQuantizer(config, pre_quantized=True)
    quantizer.remember(model)
    model.register_to_config(quantization_config=config)
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, Method.VQ4DIT
    container.align(model)
    return container.round_for_storage(model) if storage == "float16" else model


def save(
    model: ModelMixin, folder: str | Path, provenance: Mapping[str, Any] | None = None, storage: str | None = None
) -> Path:
    """Write a packed transformer to `folder`, whole or not at all; returns the folder.

    provenance: JSON-safe notes kept in config.json. The model is attached first (see `attach`), which rounds its other
    tensors to `storage`, by default the one it was hardened or loaded with, else float16: what is in memory afterwards is
    what is on disk, and reloading gives bit-equal outputs of a model in float32. An existing checkpoint is replaced;
    FileExistsError where the folder holds anything else, ValueError where float32 is asked of a model that was rounded to float16 before.
    """
    model = structure.unwrapped(model)
    known = getattr(model, "hf_quantizer", None)
    scope = None
    if isinstance(known, VQQuantizer):  # saved or loaded before: what is known of it stays true
        scope = known.quantization_config.config.codebook_scope
        provenance = known.quantization_config.provenance if provenance is None else provenance
    folder, storage = Path(folder).expanduser(), stored_in(model, storage)
    attach(model, provenance, storage, scope)
    with write_folder(folder, may_replace={CONFIG, WEIGHTS}) as partial:
        model.save_pretrained(partial, max_shard_size="1000TB")
    return folder


def load_transformer(
    folder: str | Path, device: torch.device | str = "cpu", model_class: type[ModelMixin] | None = None
) -> ModelMixin:
    """The packed transformer of a folder, in eval mode, float32 with codebooks as stored, on `device` (as for `vqlib.load`).

    model_class: of a transformer that is one's own; diffusers' are found by the name that the folder gives. Safe on files
    from strangers: config, header, sizes and checksums are checked before anything is allocated from their claims. Raises
    CheckpointError naming file, tensor and reason.
    """
    folder, device = Path(folder).expanduser(), device_of(device)
    recover_folder(folder)
    file = folder / CONFIG
    model_class, config = _read_config(file, model_class)
    header = read_header(folder / WEIGHTS)
    settings = {k: v for k, v in config.items() if k != "quantization_config"}
    if header.config != container.config_digest(model_class.__name__, settings, config["quantization_config"]):
        raise CheckpointError(file, "", "is not the config that was saved with these weights")
    require_plausible(file, settings, len(header.names()))
    try:
        model = model_class.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # whatever diffusers stumbles over, the file is at fault: it was checked to be ours
        raise CheckpointError(folder, "", f"{model_class.__name__} cannot be built ({error})") from error
    return model.to(device).eval()


def size_report(model: nn.Module) -> pd.DataFrame:
    """Where the bytes of a packed model's file are, as `save` writes it: one row per linear of its blocks, a last one for all the rest.

    Columns: layer, shape ("out×in"), k, d, codes_bytes, codebook_bytes (with the scale, if any), bias_bytes,
    other_bytes, bits_per_weight (codes and codebook; of a layer left in full precision, its weights), code_entropy (bits a code
    by the layer's own frequencies). What several layers share is counted at the first. `attrs` holds tensor_bytes, the file
    without its header, and over all these layers bits_per_weight and what an entropy coder would make of it, entropy_coded.
    """
    layers = packed_layers(model)
    stored, _ = container.encode(model.state_dict(), stored_in(model, None), "")
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in stored.items()}
    rows = [_row(name, layer, sizes) for name, layer in layers.items()]
    dense = structure.quantizable(model) if layers else {}
    rows += [_dense_row(name, layer, sizes) for name, layer in dense.items()]
    columns = ("codes_bytes", "codebook_bytes", "bias_bytes", "other_bytes")
    packed = sum(row[column] for row in rows for column in columns)
    rest = dict.fromkeys(columns, 0) | {
        "layer": "(not packed)",
        "shape": "",
        "other_bytes": sum(sizes.values()) - packed,
    }
    table = pd.DataFrame([*rows, rest]).astype({"k": "Int64", "d": "Int64"})
    weights = sum(layer.in_features * layer.out_features for layer in (*layers.values(), *dense.values()))
    bits = 8 * sum(row["codes_bytes"] + row["codebook_bytes"] + row["other_bytes"] for row in rows)
    saved = sum(8 * row["codes_bytes"] - row["code_entropy"] * layers[row["layer"]].count for row in rows if "k" in row)
    over = {"bits_per_weight": bits, "entropy_coded": bits - saved}
    table.attrs = {"tensor_bytes": sum(sizes.values())}
    table.attrs |= {name: value / weights if weights else float("nan") for name, value in over.items()}
    return table


def stored_in(model: nn.Module, asked: str | None) -> str:
    """What other tensors than codes and codebooks are stored in: as asked, as is known of the model, or float16.

    ValueError where float32 is asked of a model that was rounded to float16.
    """
    known = getattr(model, "hf_quantizer", None)
    held = known.quantization_config.storage if isinstance(known, VQQuantizer) else None
    if (held, asked) == ("float16", "float32"):
        raise ValueError(
            "storage='float32': the model was rounded to float16 when it was packed; use harden(student, 'float32')"
        )
    return asked or held or "float16"


def _row(name: str, layer: VQLinear, sizes: Mapping[str, int]) -> dict[str, Any]:
    codes, codebook, scale, bias = (sizes.get(f"{name}.{part}", 0) for part in ("codes", "codebook", "scale", "bias"))
    return {
        "layer": name,
        "shape": f"{layer.out_features}×{layer.in_features}",
        "k": layer.k,
        "d": layer.d,
        "codes_bytes": codes,
        "codebook_bytes": codebook + scale,
        "bias_bytes": bias,
        "other_bytes": 0,
        "bits_per_weight": 8 * (codes + codebook + scale) / (layer.in_features * layer.out_features),
        "code_entropy": layer.code_entropy(),
    }


def _dense_row(name: str, layer: nn.Linear, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Of a layer that is left in full precision."""
    weight, bias = (sizes.get(f"{name}.{part}", 0) for part in ("weight", "bias"))
    row = {"layer": name, "shape": f"{layer.out_features}×{layer.in_features}", "codes_bytes": 0, "codebook_bytes": 0}
    return row | {"bias_bytes": bias, "other_bytes": weight, "bits_per_weight": 8 * weight / layer.weight.numel()}


def _scope(layers: Mapping[str, VQLinear]) -> str:
    """What shares a codebook, told by how many different ones there are."""
    distinct = len({layer.codebook.data_ptr() for layer in layers.values()})
    if distinct == len(layers):
        return "layer"
    return "model" if distinct == 1 else "block"


def _read_config(file: Path, own: type[ModelMixin] | None) -> tuple[type[ModelMixin], dict[str, Any]]:
    """config.json of a packed checkpoint and the class it names, `own` or one of diffusers'. Raises CheckpointError."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(CONFIG_LIMIT + 1)
    except OSError as error:
        raise CheckpointError(file, "", f"cannot be read ({error.strerror})") from None
    if len(raw) > CONFIG_LIMIT:
        raise CheckpointError(file, "", f"is larger than {CONFIG_LIMIT} bytes")
    config = parse_json(raw, file, "config")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != Method.VQ4DIT.value:
        raise CheckpointError(file, "quantization_config", "is not that of a packed checkpoint")
    if quantization.get("format") != FORMAT:
        reason = f"format {quantization.get('format')!r}; this version reads format {FORMAT}"
        raise CheckpointError(file, "quantization_config", reason)
    name = config.get("_class_name")
    model_class = own if own and own.__name__ == name else getattr(diffusers, str(name), None)
    if not isinstance(model_class, type) or not issubclass(model_class, ModelMixin):
        reason = f"{name!r} is not a diffusers model; of one of your own give model_class"
        raise CheckpointError(file, "_class_name", reason)
    return model_class, config
