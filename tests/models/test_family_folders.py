"""Folders of every family in diffusers' layout: what they say of their process is heeded, prompts come from a file."""

import json

import families
import pytest
import torch

import vqlib
from vqlib.models import flux, pixart, sd3
from vqlib.models.ddpm import NoiseSchedule
from vqlib.models.flow import FlowMatching
from vqlib.studies.sources import Source

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
SCHEDULERS = {
    "plain DiT": {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"} | BETAS,
    "SiT": FLOW | {"shift": 1.0},
    "PixArt": {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing"} | BETAS,
    "SD3": FLOW | {"shift": 3.0},
    "FLUX": FLOW | {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
}


@pytest.fixture(params=SCHEDULERS)
def folder(request, tmp_path):
    pipe, target = families.ALL[request.param](), tmp_path / request.param
    saved(pipe, target)
    return pipe, target


def saved(pipe, target):
    pipe.transformer.save_pretrained(target / "transformer")
    pipe.vae.save_pretrained(target / "vae")
    (target / "scheduler").mkdir()
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULERS[target.name]))
    (target / "model_index.json").write_text("{}")


def loaded(pipe, target, **more):
    prompts = getattr(pipe.denoiser, "prompts", None)
    return vqlib.load(target, prompts=prompts and prompts.save(target / "prompts.safetensors"), **more)


def test_a_folder_is_loaded_with_its_process_and_conditions(folder):
    pipe, target = folder
    found = loaded(pipe, target)
    assert type(found.denoiser) is type(pipe.denoiser) and found.null_class == pipe.null_class
    if target.name == "plain DiT":
        assert isinstance(found.schedule, NoiseSchedule) and found.schedule.variance == "large"
    elif target.name == "PixArt":
        assert (found.schedule.variance, found.schedule.spacing) == ("none", "trailing")
    else:
        assert isinstance(found.schedule, FlowMatching)
    if target.name == "SD3":  # the scheduler's own smallest σ, shifted as diffusers does
        assert found.schedule.lowest == pytest.approx(0.003 / 1.002)
    if target.name == "FLUX":  # of 128 × 128 latents: 4096 tokens
        assert found.schedule.shift == pytest.approx(torch.tensor(1.15).exp().item())
        assert found.latent_shape == (4, 128, 128)
    elif hasattr(pipe.denoiser, "prompts"):
        assert found.class_names == families.TEXTS
    if hasattr(pipe.denoiser, "prompts"):  # they lie in the folder now
        assert vqlib.load(target).denoiser.identity() == found.denoiser.identity()
    if target.name != "FLUX":
        x, t, y = torch.randn(2, *pipe.latent_shape), torch.tensor([3.0, 700.0]), torch.tensor([0, 2])
        torch.testing.assert_close(found.output(x, t, y, 2.0), pipe.output(x, t, y, 2.0), rtol=1e-4, atol=1e-5)


def test_prompts_are_asked_for_before_weights_are_read(folder):
    pipe, target = folder
    if not hasattr(pipe.denoiser, "prompts"):
        assert vqlib.load(target, prompts=None).class_names == tuple(map(str, range(10)))
        return
    (target / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="takes prompts: give prompts= a file of them, or texts"):
        vqlib.load(target)
    with pytest.raises(FileNotFoundError, match="there is no file of prompts"):
        vqlib.load(target, prompts=target / "none.safetensors")


def test_a_worker_has_the_prompts_that_the_study_names(tmp_path):
    pipe, target = families.sd3(), tmp_path / "SD3"
    saved(pipe, target)
    moved = families.others(pipe)["denoiser.prompts"].denoiser.prompts
    moved.save(target / "prompts.safetensors")
    found = vqlib.load(target, prompts=pipe.denoiser.prompts.save(tmp_path / "own.safetensors"))
    assert Source.of(found).load("cpu").identity() == found.identity()
    unnamed = vqlib.load(target, prompts=pipe.denoiser.prompts)  # a worker finds those in the folder
    with pytest.raises(RuntimeError, match="SD3 is another pipeline here: denoiser.prompts="):
        Source.of(unnamed).load("cpu")


class Encoders:
    """What is left of a diffusers pipeline without transformer and VAE; every call is of one family."""

    def __init__(self, *given):
        self.given = given

    def encode_prompt(self, *args, **kwargs):
        return self.given


def test_texts_are_encoded_with_the_empty_prompt_behind():
    two, none = torch.arange(2.0 * 3 * 4).view(2, 3, 4), torch.full((2, 3, 4), -1.0)
    pooled, none_pooled = torch.ones(2, 5), torch.zeros(2, 5)
    found = sd3.encode(Encoders(two, none, pooled, none_pooled), ["a", "b"])
    assert torch.equal(found.tensors["prompt_embeds"], torch.cat([two, none[:1]]))
    assert found.tensors["pooled_prompt_embeds"][:, 0].tolist() == [1, 1, 0]
    mask, none_mask = torch.ones(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
    found = pixart.encode(Encoders(two, mask, none, none_mask), ["a", "b"])
    assert found.tensors["prompt_attention_mask"].sum(1).tolist() == [3, 3, 0]
    three = torch.cat([two, none[:1]])
    found = flux.encode(Encoders(three, torch.tensor([[1.0], [2.0], [0.0]]), None), ["a", "b"])
    assert found.texts == ("a", "b") and torch.equal(found.tensors["prompt_embeds"], three)
