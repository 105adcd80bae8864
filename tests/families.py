"""A pipeline of each family with seeded weights, small enough for a whole chain in a test."""

from dataclasses import replace

import tiny
import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)

from vqlib.models.class_conditional import SiT
from vqlib.models.ddpm import NoiseSchedule
from vqlib.models.flow import FlowMatching
from vqlib.models.flux import Flux
from vqlib.models.pipeline import Pipeline
from vqlib.models.pixart import PixArt
from vqlib.models.prompts import Prompts
from vqlib.models.sd3 import SD3

TEXTS = ("a red boat", "two cats", "a house in the snow")
CLASSES = tuple("abcdefghij")
WORDS, WIDTH, POOLED = 5, 32, 24  # of an encoded prompt


def prompts(mask: bool = False) -> Prompts:
    generator = torch.Generator().manual_seed(7)
    tensors = {"prompt_embeds": torch.randn(len(TEXTS) + 1, WORDS, WIDTH, generator=generator)}
    if mask:  # the prompts have 5, 4, 3 words, none has 1
        tensors["prompt_attention_mask"] = (torch.arange(WORDS) < torch.tensor([[5], [4], [3], [1]])).long()
    else:
        tensors["pooled_prompt_embeds"] = torch.randn(len(TEXTS) + 1, POOLED, generator=generator)
    return Prompts(TEXTS, tensors)


def vae(channels: int) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        sample_size=32,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.5,
        shift_factor=0.1,
    ).eval()


def betas(variance: str, **settings) -> NoiseSchedule:
    return replace(NoiseSchedule.linear(), variance=variance, **settings)


def made(kind, **settings):
    torch.manual_seed(1)
    model = kind(**settings).eval().requires_grad_(False)
    for name, values in model.named_parameters():  # what starts at zero would hide what stands before it
        if not values.any():
            torch.nn.init.normal_(values, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return model


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
TEXT = {"joint_attention_dim": WIDTH, "pooled_projection_dim": POOLED}


def plain_dit(variance: str = "small") -> Pipeline:
    """A DiT that gives ε alone."""
    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    model = made(DiTTransformer2DModel, **HEADS, **sizes, num_embeds_ada_norm=10)
    return Pipeline("plain DiT", model, tiny.vae(), betas(variance), CLASSES)


def sit() -> Pipeline:
    pipe = plain_dit()
    return replace(pipe, name="SiT", schedule=FlowMatching(), denoiser=None)


def pixart() -> Pipeline:
    sizes = {"in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    model = made(PixArtTransformer2DModel, **HEADS, **sizes, cross_attention_dim=32, caption_channels=WIDTH)
    schedule = betas("none", spacing="trailing")
    return Pipeline("PixArt", model, vae(4), schedule, TEXTS, PixArt(prompts(mask=True)))


def sd3() -> Pipeline:
    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    more = {"caption_projection_dim": 32, "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    model = made(SD3Transformer2DModel, **HEADS, **sizes, **TEXT, **more)
    lowest = 3.0 / 1000 / (1 + 2.0 / 1000)  # 3σ / (1 + 2σ) of σ = 1/1000
    return Pipeline("SD3", model, vae(4), FlowMatching(3.0, lowest), TEXTS, SD3(prompts()))


def flux() -> Pipeline:
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "patch_size": 1}
    model = made(FluxTransformer2DModel, **HEADS, **sizes, **TEXT, guidance_embeds=True, axes_dims_rope=(4, 6, 6))
    return Pipeline("FLUX", model, vae(4), FlowMatching(1.5), TEXTS, Flux(prompts(), side=8))


def others(pipe: Pipeline) -> dict[str, Pipeline]:
    """An SD3 with the same weights and other outputs: by its prompts, how many there are, or its process."""
    own = pipe.denoiser.prompts
    moved = Prompts(own.texts, {name: rows + 0.01 for name, rows in own.tensors.items()})
    fewer = Prompts(own.texts[1:], {name: rows[1:] for name, rows in own.tensors.items()})
    return {
        "denoiser.prompts": replace(pipe, denoiser=SD3(moved)),
        "conditions": replace(pipe, denoiser=SD3(fewer), class_names=fewer.texts),
        "process.shift": replace(pipe, schedule=replace(pipe.schedule, shift=9.0)),
    }


__all__ = ["ALL", "SiT", "flux", "others", "pixart", "plain_dit", "prompts", "sd3", "sit"]
ALL = {"plain DiT": plain_dit, "SiT": sit, "PixArt": pixart, "SD3": sd3, "FLUX": flux}
