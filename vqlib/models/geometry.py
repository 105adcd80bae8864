"""What a DiT's config alone tells: its linears, weights, operations, and sizes as the paper counts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffusers import DiTTransformer2DModel

from vqlib.config import VQConfig

MIB = 2**20
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of a number in a codebook
FREQUENCIES = 256  # inputs of the timestep embedder


@dataclass(frozen=True)
class Sizes:
    """Of the blocks' linears in MiB, as the paper counts: packed codes, codebooks with scales, biases in float32."""

    full: float  # everything in float32, before quantization
    codes: float
    codebooks: float
    biases: float

    @property
    def total(self) -> float:
        """The quantized blocks."""
        return self.codes + self.codebooks + self.biases


@dataclass(frozen=True)
class Geometry:
    """The shape of a class-conditional DiT; the defaults are DiT-XL/2's for 256×256 images."""

    hidden: int = 1152
    heads: int = 16
    depth: int = 28
    patch: int = 2
    sample_size: int = 32  # side of the latents
    in_channels: int = 4
    out_channels: int = 8
    classes: int = 1000

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Geometry:
        """From the config of a diffusers DiT (`transformer.config`)."""
        return cls(
            hidden=config["num_attention_heads"] * config["attention_head_dim"],
            heads=config["num_attention_heads"],
            depth=config["num_layers"],
            patch=config["patch_size"],
            sample_size=config["sample_size"],
            in_channels=config["in_channels"],
            out_channels=config["out_channels"] or config["in_channels"],
            classes=config["num_embeds_ada_norm"],
        )

    def build(self) -> DiTTransformer2DModel:
        """diffusers' model of this shape, its weights random."""
        return DiTTransformer2DModel(**self.config())

    def config(self, depth: int | None = None) -> dict[str, int]:
        """Arguments of diffusers' DiTTransformer2DModel; `depth` gives another number of blocks."""
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.hidden // self.heads,
            "num_layers": depth or self.depth,
            "patch_size": self.patch,
            "sample_size": self.sample_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "num_embeds_ada_norm": self.classes,
        }

    def first(self, depth: int) -> Geometry:
        """The same shape with the first blocks alone."""
        return replace(self, depth=depth)

    @property
    def tokens(self) -> int:
        return (self.sample_size // self.patch) ** 2

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each quantized linear of one block, by its name in diffusers."""
        h = self.hidden
        attention = {f"attn1.{name}": (h, h) for name in ("to_q", "to_k", "to_v", "to_out.0")}
        return {"norm1.linear": (6 * h, h)} | attention | {"ff.net.0.proj": (4 * h, h), "ff.net.2": (h, 4 * h)}

    @property
    def block_weights(self) -> int:
        """Quantized weights of one block."""
        return sum(out * into for out, into in self.linears().values())

    @property
    def block_biases(self) -> int:
        return sum(out for out, _ in self.linears().values())

    @property
    def weights(self) -> int:
        """Quantized weights of all blocks."""
        return self.depth * self.block_weights

    @property
    def biases(self) -> int:
        return self.depth * self.block_biases

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(out, in) of every quantized linear."""
        return self.depth * list(self.linears().values())

    @property
    def embedder_weights(self) -> int:
        """One copy of the timestep and class embedders; diffusers holds one in every block."""
        return FREQUENCIES * self.hidden + self.hidden**2 + 2 * self.hidden + (self.classes + 1) * self.hidden

    @property
    def parameters(self) -> int:
        """Of the model itself, the embedders counted once."""
        outer = self.hidden * self.in_channels * self.patch**2 + self.hidden
        outer += 2 * self.hidden * (self.hidden + 1) + (self.hidden + 1) * self.out_channels * self.patch**2
        return outer + self.embedder_weights + self.depth * (self.block_weights + self.block_biases)

    @property
    def parameters_in_memory(self) -> int:
        """As diffusers holds them, with the embedders in every block."""
        return self.parameters + (self.depth - 1) * self.embedder_weights

    def flops(self, rows: int = 1) -> float:
        """Floating point operations of the blocks for `rows` latents; a multiply-add is two."""
        per_token = self.block_weights - 6 * self.hidden**2  # the modulation is computed once a row
        attention = 2 * self.tokens**2 * self.hidden
        return 2.0 * rows * self.depth * (self.tokens * per_token + attention + 6 * self.hidden**2)

    def sizes(self, vq: VQConfig) -> Sizes:
        """Sizes under the paper's counting. ValueError for a pattern that fits no layer."""
        block = {name: (out, into, out) for name, (out, into) in self.linears().items()}
        linears = {f"transformer_blocks.{i}.{n}": s for i in range(self.depth) for n, s in block.items()}
        vq.require_used(linears)
        return counted(linears, vq)


def counted(linears: Mapping[str, tuple[int, int, int]], vq: VQConfig) -> Sizes:
    """Sizes of linears (out, in, biases) by name, `list.block.…`: of those that are quantized, each with its own k and d."""
    layers = {name: shape for name, shape in linears.items() if vq.takes(name)}
    codes, books = 0.0, set()
    for name, (out, into, _) in layers.items():
        own = vq.for_layer(name)
        codes += out * into // own.d * (own.k - 1).bit_length() / 8
        group = {"layer": name, "block": tuple(name.split(".")[:2]), "model": ""}[vq.codebook_scope]
        books.add((group, own.k, own.d))  # layers share a codebook of one size only
    weights = sum(out * into for out, into, _ in layers.values())
    biases = sum(count for *_, count in layers.values())
    scales = 0 if vq.codebook_scope == "layer" else 4 * len(layers)
    size = BYTES[vq.codebook_dtype] * sum(k * d for _, k, d in books) + scales
    return Sizes(4 * (weights + biases) / MIB, codes / MIB, size / MIB, 4 * biases / MIB)
