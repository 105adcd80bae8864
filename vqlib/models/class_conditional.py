"""Class-conditional transformers in diffusers' DiT form: DiT (Peebles & Xie 2023) and SiT (Ma et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vqlib.models.denoiser import Denoiser

GUIDED_CHANNELS = {4: 3}  # of so many channels, as both published samplers do; of any other number all of them


class DiT(Denoiser):
    """ε [R, C, h, w], or ε and v [R, 2C, h, w] of a learned variance; labels [R] are classes."""

    def forward(
        self, transformer: nn.Module, x: Tensor, timestep: Tensor, labels: Tensor, guidance_scale: float
    ) -> Tensor:
        return forward(transformer, x, timestep, labels)

    def guided_channels(self, channels: int) -> int:
        return GUIDED_CHANNELS.get(channels, channels)

    def require_fitting(self, name: str, transformer: nn.Module, conditions: int) -> None:
        config = getattr(transformer, "config", None)
        if config is None:
            raise ValueError(f"{name}: a {type(transformer).__name__} has no config: it is no DiT of diffusers'")
        known, channels, out = config.num_embeds_ada_norm, config.in_channels, config.out_channels or config.in_channels
        if out not in (channels, 2 * channels):
            raise ValueError(f"{name}: out_channels {out} for in_channels {channels}; need as many, or twice as many")
        if conditions != known:
            raise ValueError(f"{name}: {conditions} class names for a transformer of {known} classes")
        for key, module in transformer.named_modules():
            # Guidance and calibration ask for "no class", the row behind the classes.
            if key.endswith("class_embedder.embedding_table") and module.num_embeddings != conditions + 1:
                rows = module.num_embeddings
                raise ValueError(
                    f"{name}: {rows} rows for {conditions} classes: the one for no class is missing ({key})"
                )


class SiT(DiT):
    """Flow matching: of the output's channels the first C are the velocity.

    `original`: the weights are those of an original `.pt`, which is told 1 − σ, and whose velocity leads to the data.
    """

    def __init__(self, original: bool = False) -> None:
        self.original = original

    def forward(
        self, transformer: nn.Module, x: Tensor, timestep: Tensor, labels: Tensor, guidance_scale: float
    ) -> Tensor:
        if self.original:
            timestep = 1.0 - timestep / 1000
        velocity = forward(transformer, x, timestep, labels)
        return torch.neg(velocity) if self.original else velocity

    def identity(self) -> dict[str, Any]:
        return {"original": self.original}


def forward(transformer: nn.Module, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
    """The transformer's output [R, C or 2C, h, w] for latents [R, C, h, w], model times [R] and class labels [R]."""
    return transformer(x, timestep=timestep, class_labels=labels).sample
