"""diffusers as host: importing this file registers quant_method "vq4dit", so that diffusers' own calls work.

`from_pretrained(folder)`, `AutoModel`, `save_pretrained`, whole pipelines, `quantization_config=VQConfig(…)` on load
(k-means only, one codebook per layer) and `dequantize()`. The files are those of `vqlib.packed.container`.
"""

from __future__ import annotations

import json
import logging
from abc import ABC
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from vqlib.config import VQConfig
from vqlib.models import structure
from vqlib.packed import container
from vqlib.packed.header import FORMAT, CheckpointError, Header, parse_json, read_header, require_layer
from vqlib.packed.layer import VQLinear
from vqlib.quantizer.codebook import fit_codebook
from vqlib.quantizer.subvectors import split

LOG = logging.getLogger("vqlib")


class Method(str, Enum):
    """The name under which diffusers finds this backend; it asks for an enum member that is a string."""

    VQ4DIT = "vq4dit"


class PackedConfig(ABC):
    """`quantization_config` of a packed model. VQConfig counts as one, so either is accepted by diffusers.

    config: k, d, `layers`, codebook scope; storage: "float16" or "float32", of all other tensors; provenance: JSON-safe notes.
    """

    quant_method = Method.VQ4DIT

    def __init__(self, config: VQConfig, storage: str = "float16", provenance: Mapping[str, Any] | None = None) -> None:
        if storage not in ("float16", "float32"):
            raise ValueError(f"storage={storage!r} is neither 'float16' nor 'float32'")
        self.config, self.storage = config, storage
        self.provenance = json.loads(json.dumps(dict(provenance or {})))  # as config.json will give it back

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PackedConfig:
        """From config.json. Raises ValueError on another format version."""
        if values.get("format") != FORMAT:
            raise ValueError(f"format {values.get('format')!r}; this version reads format {FORMAT}")
        own = {name: values[name] for name in ("k", "d", "codebook_scope")}
        config = VQConfig(**own, layers=values.get("layers", ()), candidates=1)
        return cls(config, values["storage"], values["provenance"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; the inverse of `from_dict`."""
        return {
            "quant_method": Method.VQ4DIT.value,
            "format": FORMAT,
            "bits": self.config.bits,
            "k": self.config.k,
            "d": self.config.d,
            "codebook_scope": self.config.codebook_scope,
            "storage": self.storage,
            "provenance": self.provenance,
        } | ({"layers": self.config.layers} if self.config.layers else {})  # absent in files that were made before it

    def __repr__(self) -> str:
        return f"PackedConfig({self.config}, storage={self.storage!r})"


class VQQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads and saves; the order of the methods below is the order of its calls."""

    supports_parallel_loading = False
    is_serializable = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: PackedConfig | VQConfig, **kwargs) -> None:
        if isinstance(quantization_config, VQConfig):
            settings = quantization_config
            notes = {"made_by": "k-means on load", "kmeans_iterations": settings.kmeans_iterations, "seed": 0}
            quantization_config = PackedConfig(settings, provenance=notes)
            whole = "load it without a quantization_config and call vqlib.quantize"
            if (scope := settings.codebook_scope) != "layer":
                raise ValueError(f"codebook_scope={scope!r} needs the whole model at once: {whole}")
            if settings.assignment != "nearest":
                raise ValueError(f"assignment={settings.assignment!r} needs the whole model's inputs: {whole}")
        super().__init__(quantization_config, **kwargs)
        self.settings: dict[str, Any] = {}  # the model's config as JSON would hold it, for the checksum
        self.class_name = ""
        self._dtype: torch.dtype | None = None
        self._header: Header | None = None
        self._dtypes: dict[str, torch.dtype] = {}
        self._targets: dict[str, tuple[int, int]] = {}
        self._keys: list[str] = []
        self._scales: dict[str, Tensor] = {}

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """Remember what floating tensors will be cast to."""
        self._dtype = torch_dtype
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Read and check the header of a packed file; the names it provides, copies included."""
        self._keys = list(loaded_keys)
        if self.pre_quantized:
            if len(checkpoint_files) != 1:
                reason = f"{len(checkpoint_files)} shards; a packed model is one file"
                raise CheckpointError(checkpoint_files[0], "", reason)
            self._header = read_header(Path(checkpoint_files[0]))
            self._keys = self._header.names()
        return self._keys

    def _process_model_before_weight_loading(self, model: ModelMixin, **kwargs) -> None:
        """Swap linears for packed layers on the meta skeleton, before anything is allocated."""
        self.remember(model)
        if self.pre_quantized:
            self._swap_packed(model)
        else:
            self._swap_for_kmeans(model)
        model.register_to_config(quantization_config=self.quantization_config)

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Checked and expanded tensors of a packed file, or k-means of each target layer in this shard."""
        if not self.pre_quantized:
            return self._fit(state_dict)
        state_dict = container.decode(state_dict, self._header, self._dtypes)
        self._scales = {k: v for k, v in state_dict.items() if k.removesuffix(".scale") in self._targets}
        return state_dict

    def _process_model_after_weight_loading(self, model: ModelMixin, **kwargs) -> ModelMixin:
        """Put back what the loader's cast took away: float32 scales, and one object for every stored tensor."""
        for name, scale in self._scales.items():
            layer = model.get_submodule(name.removesuffix(".scale"))
            layer.scale = scale.to(layer.codes.device)
        if self._header is not None:
            for name, source in self._header.aliases.items():
                _tie(model, name, source)
        else:
            container.align(model)
            container.round_for_storage(model)
        self._header, self._dtypes, self._scales, self._keys = None, {}, {}, []
        return model.requires_grad_(False)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes."""
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle; packed models are safetensors only")
        digest = container.config_digest(self.class_name, self.settings, self.quantization_config.to_dict())
        return container.encode(state_dict, self.quantization_config.storage, digest)

    def remember(self, model: ModelMixin) -> None:
        """Note the class and settings that `model`'s checkpoint will vouch for; keep paths out of its config.json."""
        model.to_json_string = partial(_portable_json, model)  # no method: a model that is pickled takes it along
        self.class_name = type(model).__name__
        self.settings = parse_json(model.to_json_string().encode(), "config.json", "model config")

    def _dequantize(self, model: ModelMixin) -> ModelMixin:
        """Dense `nn.Linear` layers, tensors of their own, and a config that no longer speaks of quantization."""
        dtype = model.dtype
        for name, layer in list(packed_layers(model).items()):
            structure.swap(model, name, _dense(layer, dtype))
        for module in model.modules():
            for name, value in module._parameters.items():
                module._parameters[name] = None if value is None else nn.Parameter(value.detach().clone())
            for name, value in module._buffers.items():
                module._buffers[name] = None if value is None else value.clone()
        dropped = ("quantization_config", "_pre_quantization_dtype", "_name_or_path")
        model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k not in dropped})
        for name in ("quantization_method", "to_json_string"):
            model.__dict__.pop(name, None)
        return model

    def _swap_packed(self, model: ModelMixin) -> None:
        header, beside = self._header, self._header.file.with_name("config.json")
        said = parse_json(beside.read_bytes(), beside, "model config") if beside.exists() else self.settings
        settings = {k: v for k, v in self.settings.items() if k in said}  # a later diffusers may have more of them
        if header.config != container.config_digest(self.class_name, settings, self.quantization_config.to_dict()):
            raise CheckpointError(header.file, "", "config.json is not the one that was saved with these weights")
        linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        for name in header.layers():
            if name not in linears:
                reason = f"{self.class_name} has no linear layer of that name"
                raise CheckpointError(header.file, f"{name}.codes", reason)
            old = linears[name]
            k, d, dtype = require_layer(header, name, old.in_features, old.out_features)
            self._put(model, name, k, d, dtype)
        expected = model.state_dict()
        for name in sorted(expected.keys() ^ set(header.names())):
            reason = "is missing" if name in expected else f"is not part of this {self.class_name}"
            raise CheckpointError(header.file, name, reason)
        for name, tensor in expected.items():
            entry = header.find(name)
            if entry is not None and entry.shape != tuple(tensor.shape):
                reason = f"has shape {list(entry.shape)}, the model {list(tensor.shape)}"
                raise CheckpointError(header.file, name, reason)
            self._dtypes[name] = self._dtype if self._dtype and not name.endswith(".scale") else tensor.dtype

    def _swap_for_kmeans(self, model: ModelMixin) -> None:
        config, skipped = self.quantization_config.config, []
        config.require_used(found := structure.quantizable(model))
        for name, layer in ((name, layer) for name, layer in found.items() if config.takes(name)):
            own = config.for_layer(name)
            if reason := _unfit(layer, own):
                skipped.append(f"{name} ({reason})")
                continue
            self._put(model, name, own.k, own.d, getattr(torch, config.codebook_dtype))
            self._keys.remove(f"{name}.weight")
            # diffusers holds this very list; it is compared with the model's names after the swap.
            self._keys.extend(f"{name}.{part}" for part in ("codes", "codebook", "scale"))
        if skipped:
            LOG.warning("%d linear layers stay as they are: %s", len(skipped), "; ".join(skipped))
        if not self._targets:
            raise ValueError(f"no linear layer of {self.class_name} can be quantized with k={config.k}, d={config.d}")

    def _put(self, model: ModelMixin, name: str, k: int, d: int, dtype: torch.dtype) -> None:
        old = model.get_submodule(name)
        bias = old.bias is not None
        structure.swap(model, name, VQLinear(old.in_features, old.out_features, bias, d, k, "meta", dtype))
        self._targets[name] = (k, d)

    def _fit(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        config = self.quantization_config.config
        for name, (k, d) in self._targets.items():
            weight = state_dict.pop(f"{name}.weight", None)
            if weight is None:
                continue  # in another shard
            x, iterations = split(weight.float(), d, name), config.kmeans_iterations
            book = fit_codebook(x, k, seed=0, iterations=iterations, name=name)
            codewords = book.codewords.to(getattr(torch, config.codebook_dtype))
            layer = VQLinear.from_assignments(book.assignments, codewords, tuple(weight.shape))
            self._scales[f"{name}.scale"] = layer.scale
            state_dict.update({f"{name}.{part}": getattr(layer, part) for part in ("codes", "codebook", "scale")})
        return state_dict


def packed_layers(model: nn.Module) -> dict[str, VQLinear]:
    """The packed layers of a model by their dotted names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, VQLinear)}


def register() -> None:
    """Enter this backend in diffusers' two tables; it has no call for that."""
    VQConfig.quant_method = Method.VQ4DIT  # what diffusers asks any quantization_config for
    PackedConfig.register(VQConfig)
    AUTO_QUANTIZER_MAPPING[Method.VQ4DIT.value] = VQQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[Method.VQ4DIT.value] = PackedConfig


def _unfit(layer: nn.Linear, config: VQConfig) -> str:
    """Why a layer cannot be quantized on load; empty where it can."""
    if layer.in_features % config.d:
        return f"in_features {layer.in_features} is not divisible by d={config.d}"
    count = layer.in_features * layer.out_features // config.d
    return f"{count} sub-vectors are fewer than k={config.k}" if count < config.k else ""


def _portable_json(model: ModelMixin) -> str:
    """config.json without the place the model was loaded from, which is a path of this machine."""
    settings = json.loads(type(model).to_json_string(model))
    settings.pop("_name_or_path", None)
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"


def _tie(model: nn.Module, name: str, source: str) -> None:
    """Make `name` the same object as `source`, so that moving the model moves it once."""
    (owner, _, leaf), (holder, _, kept) = name.rpartition("."), source.rpartition(".")
    owner, holder = model.get_submodule(owner), model.get_submodule(holder)
    if leaf in owner._parameters and kept in holder._parameters:
        owner._parameters[leaf] = holder._parameters[kept]
    elif leaf in owner._buffers and kept in holder._buffers:
        owner._buffers[leaf] = holder._buffers[kept]


def _dense(layer: VQLinear, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.weight(dtype).clone())
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype))
    return linear


register()
