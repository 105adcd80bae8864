"""A transformer by its class in diffusers and its config alone: linears, weights and sizes, counted on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import nn

from vqlib.config import VQConfig
from vqlib.models import structure
from vqlib.models.denoiser import Denoiser
from vqlib.models.families import FAMILIES, model_class
from vqlib.models.flux import Flux
from vqlib.models.geometry import Sizes, counted
from vqlib.models.pipeline import Pipeline
from vqlib.models.prompts import Prompts


@dataclass(frozen=True)
class Blueprint:
    """`kind`: the class in diffusers; `config`: its arguments; `sample_size`: side of the latents, which not every config tells.

    words: tokens of a prompt; patches are 2 × 2.
    """

    kind: str
    config: Mapping[str, Any]
    sample_size: int
    words: int

    @classmethod
    def of(cls, pipe: Pipeline) -> Blueprint:
        """Of the transformer of a text-to-image pipeline."""
        transformer, prompts = structure.unwrapped(pipe.transformer), pipe.denoiser.prompts
        config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
        config.pop("quantization_config", None)
        return cls(type(transformer).__name__, config, pipe.latent_shape[1], prompts.tensors["prompt_embeds"].shape[1])

    def build(self) -> nn.Module:
        """diffusers' model of this shape, its weights random."""
        return model_class(self.kind)(**self.config)

    def first(self, depth: int) -> Blueprint:
        """The same shape with the first blocks alone; of two kinds of blocks as many of each."""
        config = dict(self.config)
        found = signature(model_class(self.kind)).parameters
        for name in {"num_layers", "num_single_layers"} & found.keys():
            config[name] = min(depth, self.config.get(name, found[name].default))
        if "dual_attention_layers" in config:
            config["dual_attention_layers"] = tuple(i for i in config["dual_attention_layers"] if i < depth)
        return replace(self, config=config)

    def denoiser(self) -> Denoiser:
        """Its adapter, with one prompt of random numbers."""
        found, generator = signature(model_class(self.kind)).parameters, torch.Generator().manual_seed(0)
        settings = {name: parameter.default for name, parameter in found.items()} | dict(self.config)
        width = (
            settings.get("joint_attention_dim") or settings.get("caption_channels") or settings["cross_attention_dim"]
        )
        tensors = {"prompt_embeds": torch.randn(2, self.words, width, generator=generator)}
        if "pooled_projection_dim" in settings:
            tensors["pooled_prompt_embeds"] = torch.randn(2, settings["pooled_projection_dim"], generator=generator)
        else:
            tensors["prompt_attention_mask"] = torch.ones(2, self.words, dtype=torch.int64)
        made = FAMILIES[self.kind].denoiser(Prompts(["a prompt"], tensors))
        if isinstance(made, Flux):
            made.side = self.sample_size
        return made

    @cached_property
    def model(self) -> nn.Module:
        """The model without any weights."""
        with torch.device("meta"):
            return self.build()

    @cached_property
    def layers(self) -> dict[str, nn.Linear]:
        """The linears of all blocks by name."""
        return structure.quantizable(self.model)

    @property
    def depth(self) -> int:
        """How many blocks there are, of all kinds."""
        return len(structure.block_list(self.model))

    @property
    def weights(self) -> int:
        """Quantized weights of all blocks."""
        return sum(layer.weight.numel() for layer in self.layers.values())

    @property
    def biases(self) -> int:
        return sum(count for *_, count in _linears(self.layers).values())

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(out, in) of every quantized linear."""
        return [(out, into) for out, into, _ in _linears(self.layers).values()]

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def parameters_in_memory(self) -> int:
        """The same: nothing is held twice."""
        return self.parameters

    @property
    def hidden(self) -> int:
        return min(layer.in_features for layer in self.layers.values())

    @property
    def tokens(self) -> int:
        """Of the image, and of the prompt where it is a stream of its own."""
        image = (self.sample_size // 2) ** 2
        return image + (self.words if len(FAMILIES[self.kind].denoiser.streams) > 1 else 0)

    def flops(self, rows: int = 1) -> float:
        """Floating point operations of the blocks for `rows` latents, at most: as if every linear saw every token."""
        attention = 2 * self.depth * self.tokens**2 * self.hidden
        return 2.0 * rows * (self.tokens * self.weights + attention)

    def sizes(self, vq: VQConfig) -> Sizes:
        """Sizes under the paper's counting. ValueError for a pattern that fits no layer."""
        vq.require_used(self.layers)
        return counted(_linears(self.layers), vq)

    def sizes_by_kind(self, vq: VQConfig) -> dict[str, Sizes]:
        """The same by kind of layer: its name within a block, such as `attn.to_q`; a codebook of its own each."""
        kinds: dict[str, dict[str, nn.Linear]] = {}
        for name, layer in self.layers.items():
            kinds.setdefault(name.split(".", 2)[2], {})[name] = layer
        alone = vq.replace(codebook_scope="layer")
        return {kind: counted(_linears(layers), alone) for kind, layers in kinds.items()}


def _linears(layers: Mapping[str, nn.Linear]) -> dict[str, tuple[int, int, int]]:
    """(out, in, biases) by name."""
    return {n: (m.out_features, m.in_features, 0 if m.bias is None else m.bias.numel()) for n, m in layers.items()}


PIXART_SIGMA_XL = Blueprint(
    "PixArtTransformer2DModel",
    {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "num_layers": 28,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "sample_size": 128,
        "use_additional_conditions": False,
    },
    sample_size=128,
    words=300,
)
SD35_MEDIUM = Blueprint(
    "SD3Transformer2DModel",
    {
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "num_layers": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
        "sample_size": 128,
    },
    sample_size=128,
    words=333,
)
FLUX_DEV = Blueprint("FluxTransformer2DModel", {"guidance_embeds": True}, sample_size=128, words=512)
