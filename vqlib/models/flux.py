"""FLUX.1 (Black Forest Labs 2024): MMDiT blocks, then blocks of one joint stream; guidance is an input, latents go in 2 × 2 packs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqlib.models.denoiser import Denoiser
from vqlib.models.prompts import Prompts, joined

NAMES = ("prompt_embeds", "pooled_prompt_embeds")
SIDE = 128  # of the latents of a 1024 × 1024 image; the transformer's config does not say


class Flux(Denoiser):
    """The velocity [R, C, h, w]. A guidance-distilled model (dev) is told the scale; another (schnell) takes no guidance."""

    streams = ("encoder_hidden_states", "hidden_states")
    halves = False

    def __init__(self, prompts: Prompts, side: int = SIDE) -> None:
        if side < 2 or side % 2:
            raise ValueError(f"latents of side {side} cannot be packed 2 × 2")
        self.prompts, self.side = prompts.require("FLUX", NAMES), side

    def latent_shape(self, transformer: nn.Module) -> tuple[int, int, int]:
        return transformer.config.in_channels // 4, self.side, self.side

    def forward(
        self, transformer: nn.Module, x: Tensor, timestep: Tensor, labels: Tensor, guidance_scale: float
    ) -> Tensor:
        prompt = self.prompts.rows(labels, x)
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        guided = getattr(transformer.config, "guidance_embeds", False)
        velocity = transformer(
            hidden_states=pack(x),
            encoder_hidden_states=prompt["prompt_embeds"],
            pooled_projections=prompt["pooled_prompt_embeds"],
            timestep=timestep / 1000,
            guidance=torch.full((len(x),), guidance_scale, device=x.device) if guided else None,
            txt_ids=torch.zeros(prompt["prompt_embeds"].shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=positions(rows, columns).to(device=x.device, dtype=x.dtype),
        ).sample
        return unpack(velocity, rows, columns)

    def identity(self) -> dict[str, Any]:
        return {"side": self.side, "prompts": self.prompts.fingerprint()}


def pack(x: Tensor) -> Tensor:
    """Latents [R, C, 2h, 2w] -> tokens [R, h·w, 4C]; a token holds a 2 × 2 square, channel by channel."""
    r, c, height, width = x.shape
    squares = x.reshape(r, c, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(r, height * width // 4, 4 * c)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack`, for a grid of tokens."""
    r, _, width = tokens.shape
    squares = tokens.reshape(r, rows, columns, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(r, width // 4, 2 * rows, 2 * columns)


def positions(rows: int, columns: int) -> Tensor:
    """Of the image's tokens for rotary embeddings: (0, row, column), float [rows·columns, 3]; text is at the origin."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return torch.nn.functional.pad(grid, (1, 0)).float()


def encode(pipeline: Any, texts: Sequence[str]) -> Prompts:
    """Prompts by the text encoders of a diffusers FLUX pipeline."""
    embeds, pooled, _ = pipeline.encode_prompt(prompt=[*texts, ""], prompt_2=None)
    parts = dict(zip(NAMES, (embeds, pooled), strict=True))
    return joined(texts, {n: rows[:-1] for n, rows in parts.items()}, {n: rows[-1:] for n, rows in parts.items()})
