"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): MMDiT, whose blocks hand on a stream of text and one of the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vqlib.models.denoiser import Denoiser
from vqlib.models.prompts import Prompts, joined

NAMES = ("prompt_embeds", "pooled_prompt_embeds")


class SD3(Denoiser):
    """The velocity [R, C, h, w]; the last block gives no text."""

    streams = ("encoder_hidden_states", "hidden_states")

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts.require("SD3", NAMES)

    def forward(
        self, transformer: nn.Module, x: Tensor, timestep: Tensor, labels: Tensor, guidance_scale: float
    ) -> Tensor:
        prompt = self.prompts.rows(labels, x)
        return transformer(
            hidden_states=x,
            encoder_hidden_states=prompt["prompt_embeds"],
            pooled_projections=prompt["pooled_prompt_embeds"],
            timestep=timestep,
        ).sample

    def identity(self) -> dict[str, Any]:
        return {"prompts": self.prompts.fingerprint()}


def encode(pipeline: Any, texts: Sequence[str]) -> Prompts:
    """Prompts by the text encoders of a diffusers SD3 pipeline."""
    embeds, none, pooled, none_pooled = pipeline.encode_prompt(
        prompt=list(texts), prompt_2=None, prompt_3=None, do_classifier_free_guidance=True
    )
    given = dict(zip(NAMES, (embeds, pooled), strict=True))
    return joined(texts, given, dict(zip(NAMES, (none, none_pooled), strict=True)))
