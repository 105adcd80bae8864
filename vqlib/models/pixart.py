"""PixArt-α and PixArt-Σ (Chen et al. 2023, 2024): DiT blocks with cross-attention to a prompt, one adaLN for all blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqlib.models import structure
from vqlib.models.denoiser import Denoiser
from vqlib.models.prompts import Prompts, joined

NAMES = ("prompt_embeds", "prompt_attention_mask")


class PixArt(Denoiser):
    """ε [R, C, h, w], and a variance behind it, which its own pipeline does not use."""

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts.require("PixArt", NAMES)

    def forward(
        self, transformer: nn.Module, x: Tensor, timestep: Tensor, labels: Tensor, guidance_scale: float
    ) -> Tensor:
        prompt = self.prompts.rows(labels, x)
        size = {"resolution": None, "aspect_ratio": None}
        if structure.unwrapped(transformer).use_additional_conditions:  # α at 1024 × 1024; 8 pixels a latent's side
            pixels = torch.tensor([8.0 * x.shape[2], 8.0 * x.shape[3]], device=x.device, dtype=x.dtype)
            ratio = (pixels[:1] / pixels[1:]).expand(len(x), 1)
            size = {"resolution": pixels.expand(len(x), 2), "aspect_ratio": ratio}
        return transformer(
            x,
            encoder_hidden_states=prompt["prompt_embeds"],
            encoder_attention_mask=prompt["prompt_attention_mask"],
            timestep=timestep,
            added_cond_kwargs=size,
        ).sample

    def identity(self) -> dict[str, Any]:
        return {"prompts": self.prompts.fingerprint()}


def encode(pipeline: Any, texts: Sequence[str]) -> Prompts:
    """Prompts by the text encoder of a diffusers PixArt pipeline."""
    embeds, mask, none, none_mask = pipeline.encode_prompt(list(texts), do_classifier_free_guidance=True)
    given = dict(zip(NAMES, (embeds, mask), strict=True))
    return joined(texts, given, dict(zip(NAMES, (none, none_mask), strict=True)))
