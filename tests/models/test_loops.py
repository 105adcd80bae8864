"""Our sampler against the loops of diffusers' own pipelines, written out: its scheduler, its order of rows, its packing.

The pipelines themselves need the transformers package, which is none of the project's dependencies.
"""

import families
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import vqlib
from vqlib.config import SamplingConfig, VQConfig
from vqlib.packed.harden import harden

SEEDS, LABELS, STEPS, SCALE = (11, 12), (0, 2), 4, 3.0


def packed(pipe):
    return harden(vqlib.quantize(pipe.transformer, VQConfig(k=8, d=2, candidates=1, kmeans_iterations=3)))


def ours(pipe, model):
    kept = {}
    config = SamplingConfig(steps=STEPS, guidance_scale=SCALE)
    vqlib.sample(pipe.with_transformer(model), LABELS, SEEDS, config, preview=lambda done, x: kept.update(x=x.clone()))
    return kept["x"]


def noise():
    """Of the two images, [2, 4, 8, 8], each from its own seed."""
    return torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])


def guided(output):
    none, given = output.chunk(2)  # diffusers puts the unconditional half first
    return none + SCALE * (given - none)


def rows(pipe, name):
    """The embeddings of both images behind those of the empty prompt."""
    tensor = pipe.denoiser.prompts.tensors[name]
    return torch.cat([tensor[[-1, -1]], tensor[list(LABELS)]])


def pixart(pipe, model):
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    x = noise()
    for t in scheduler.timesteps:
        output = model(
            torch.cat([x, x]),
            encoder_hidden_states=rows(pipe, "prompt_embeds"),
            encoder_attention_mask=rows(pipe, "prompt_attention_mask"),
            timestep=t.expand(4),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        x = scheduler.step(guided(output).chunk(2, dim=1)[0], t, x, return_dict=False)[0]
    return x


def sd3(pipe, model):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    x = noise()
    for t in scheduler.timesteps:
        output = model(
            hidden_states=torch.cat([x, x]),
            timestep=t.expand(4),
            encoder_hidden_states=rows(pipe, "prompt_embeds"),
            pooled_projections=rows(pipe, "pooled_prompt_embeds"),
        ).sample
        x = scheduler.step(guided(output), t, x, return_dict=False)[0]
    return x


def flux(pipe, model):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.5)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    x = noise().view(2, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 16)
    places = torch.zeros(4, 4, 3)
    places[..., 1] += torch.arange(4)[:, None]
    places[..., 2] += torch.arange(4)[None, :]
    for t in scheduler.timesteps:
        velocity = model(
            hidden_states=x,
            timestep=t.expand(2) / 1000,
            guidance=torch.full([2], SCALE),
            pooled_projections=rows(pipe, "pooled_prompt_embeds")[2:],
            encoder_hidden_states=rows(pipe, "prompt_embeds")[2:],
            txt_ids=torch.zeros(families.WORDS, 3),
            img_ids=places.reshape(16, 3),
        ).sample
        x = scheduler.step(velocity, t, x, return_dict=False)[0]
    return x.view(2, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 8, 8)


@pytest.mark.parametrize("loop", [pixart, sd3, flux])
@torch.no_grad()
def test_a_packed_model_gives_the_latents_of_diffusers_loop(loop):
    pipe = getattr(families, loop.__name__)()
    model = packed(pipe)
    expected = loop(pipe, model)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(pipe, model), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_an_original_sit_is_told_the_share_of_data_and_leads_to_it():
    """SiT's own loop: from t = 0, noise, to 1, data, x ← x + v/steps; the first three channels guided."""
    pipe = families.sit()
    model = pipe.transformer
    original = vqlib.Pipeline("sit", model, pipe.vae, pipe.schedule, pipe.class_names, families.SiT(original=True))
    x, labels = noise(), torch.tensor([*LABELS, 10, 10])
    for step in range(STEPS):
        velocity = model(torch.cat([x, x]), timestep=torch.full((4,), step / STEPS), class_labels=labels).sample
        given, none = velocity.chunk(2)
        x = x + torch.cat([none[:, :3] + SCALE * (given - none)[:, :3], given[:, 3:]], dim=1) / STEPS
    torch.testing.assert_close(ours(original, model), x, rtol=1e-4, atol=1e-4)
