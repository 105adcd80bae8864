"""A packed transformer inside of diffusers' own pipelines gives, from the same noise, what the sampler here gives."""

import families
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
)

import vqlib
from vqlib.models.flux import pack
from vqlib.models.prompts import Prompts

STEPS, SCALE, SEEDS, CONDITIONS = 4, 2.5, (3, 4, 5, 6), (0, 2, 1, 0)
WIDE = {"output_type": "latent", "num_inference_steps": STEPS, "guidance_scale": SCALE, "return_dict": True}
VQ = vqlib.VQConfig(k=16, d=4, candidates=1, kmeans_iterations=3)
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}


def packed(pipe):
    return pipe.with_transformer(vqlib.harden(vqlib.quantize(pipe.transformer, VQ)))


def noise(pipe):
    """The first draw of every seed, as the sampler's."""
    draws = [torch.randn(pipe.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    return torch.stack(draws)


def latents(pipe):
    """x_0 of the sampler here, [B, C, h, w]."""
    seen = []
    vqlib.sample(pipe, CONDITIONS, SEEDS, steps=STEPS, guidance_scale=SCALE, preview=lambda done, x: seen.append(x))
    return seen[-1]


def rows(prompts: Prompts):
    """What a pipeline is given of the conditions, and of none for the other half, by the tensors' names."""
    chosen = torch.tensor(CONDITIONS)
    given = {name: rows[chosen] for name, rows in prompts.tensors.items()}
    none = {name: rows[-1:].expand(len(chosen), *rows.shape[1:]) for name, rows in prompts.tensors.items()}
    return given, {f"negative_{name}": rows for name, rows in none.items()}


def test_pixart():
    pipe = packed(families.pixart())
    scheduler = DDIMScheduler(**BETAS, timestep_spacing="trailing")
    theirs = PixArtSigmaPipeline(None, None, pipe.vae, pipe.transformer, scheduler)
    theirs.set_progress_bar_config(disable=True)
    given, none = rows(pipe.denoiser.prompts)
    size = {"height": 32, "width": 32, "use_resolution_binning": False}
    found = theirs(negative_prompt=None, latents=noise(pipe), **given, **none, **size, **WIDE).images
    torch.testing.assert_close(found, latents(pipe), rtol=1e-3, atol=1e-4)


def test_sd3():
    pipe = packed(families.sd3())
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs = StableDiffusion3Pipeline(pipe.transformer, scheduler, pipe.vae, *[None] * 6)
    theirs.set_progress_bar_config(disable=True)
    given, none = rows(pipe.denoiser.prompts)
    found = theirs(latents=noise(pipe), height=32, width=32, **given, **none, **WIDE).images
    torch.testing.assert_close(found, latents(pipe), rtol=1e-3, atol=1e-4)


def test_flux():
    pipe = packed(families.flux())
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.5)
    theirs = FluxPipeline(scheduler, pipe.vae, None, None, None, None, pipe.transformer)
    theirs.set_progress_bar_config(disable=True)
    given, _ = rows(pipe.denoiser.prompts)
    found = theirs(latents=pack(noise(pipe)), height=32, width=32, **given, **WIDE).images
    torch.testing.assert_close(found, pack(latents(pipe)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["PixArt", "SD3", "FLUX"])
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_packed_transformer_can_be_offloaded_layer_by_layer(name, scope):
    """As `enable_sequential_cpu_offload` does it: nothing stays on the device but the layer that works."""
    pipe = families.ALL[name]()
    made = vqlib.harden(vqlib.quantize(pipe.transformer, VQ.replace(codebook_scope=scope)))
    x = torch.randn(2, *pipe.latent_shape, generator=torch.Generator().manual_seed(0))
    given = x, torch.tensor([3.0, 700.0]), torch.tensor([0, 2]), SCALE
    with torch.no_grad():
        expected = pipe.output(*given, model=made)
        offloaded = cpu_offload(made, execution_device=torch.device("cpu"), offload_buffers=True)
        assert all(buffer.device.type == "meta" for name, buffer in offloaded.named_buffers() if name.endswith("codes"))
        assert torch.equal(pipe.output(*given, model=offloaded), expected)


@pytest.mark.parametrize("name", ["PixArt", "SD3", "FLUX"])
def test_a_packed_transformer_compiles_to_one_graph(name):
    pipe = packed(families.ALL[name]())
    x = torch.randn(2, *pipe.latent_shape, generator=torch.Generator().manual_seed(0))
    given = x, torch.tensor([3.0, 700.0]), torch.tensor([0, 2]), SCALE
    compiled = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    with torch.no_grad():
        # A compiler brings its own matrix products, so the outputs may differ by rounding.
        torch.testing.assert_close(pipe.output(*given, model=compiled), pipe.output(*given), rtol=1e-4, atol=1e-5)
