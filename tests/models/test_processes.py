"""Processes against diffusers' own schedulers on the same outputs and the same noise; what a scheduler's config says."""

import math
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from vqlib.models.ddpm import NoiseSchedule
from vqlib.models.flow import FlowMatching
from vqlib.models.schedulers import DDIM, DDPM, process_of

BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}


def output_of(x, t):
    """Some smooth output that depends on x and the time, as a model's does."""
    return torch.sin(2.0 * x + 0.003 * float(t)) + 0.3 * x.flip(-1)


def ours(process, steps, x, noises):
    process = process.respace(steps)
    reverse, seen = process.reverse(), []
    for index in reversed(range(steps)):
        t = process.timesteps[index]
        seen.append(float(t))
        noise = noises[index] if reverse.noisy and index else None
        x = reverse.next(output_of(x, t), x, torch.full((len(x),), index), noise)
    return x, seen


def theirs(scheduler, x, noises):
    seen, count = [], len(scheduler.timesteps)
    for done, t in enumerate(scheduler.timesteps):
        seen.append(float(t))
        # What a scheduler draws is the noise that ours is given.
        noise, options = noises[count - 1 - done], {}
        if isinstance(scheduler, DDPMScheduler):
            options["generator"] = Fixed(noise)
        x = scheduler.step(output_of(x, t), t, x, return_dict=False, **options)[0]
    return x, seen


class Fixed:
    """In the place of a generator: `randn_tensor` is patched to give its noise."""

    def __init__(self, noise):
        self.noise = noise


@pytest.fixture(autouse=True)
def given_noise(monkeypatch):
    import diffusers.schedulers.scheduling_ddpm as module

    monkeypatch.setattr(module, "randn_tensor", lambda shape, generator, device, dtype: generator.noise)


def start(steps):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 4, 4, generator=generator), torch.randn(steps, 2, 4, 4, 4, generator=generator)


CASES = [
    *(
        (DDPMScheduler, {"variance_type": kind, "timestep_spacing": "linspace"})
        for kind in ("fixed_small", "fixed_large")
    ),
    (DDPMScheduler, {"variance_type": "fixed_small", "timestep_spacing": "leading", "prediction_type": "v_prediction"}),
    (DDPMScheduler, {"variance_type": "fixed_small", "timestep_spacing": "trailing", "prediction_type": "sample"}),
    (DDIMScheduler, {"timestep_spacing": "leading", "steps_offset": 1, "beta_schedule": "scaled_linear"}),
    (
        DDIMScheduler,
        {"timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    ),
    (DDIMScheduler, {"timestep_spacing": "leading", "prediction_type": "v_prediction"}),
    (
        DDIMScheduler,
        {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ),
]


@pytest.mark.parametrize(("kind", "settings"), CASES)
@pytest.mark.parametrize("steps", [1, 10])
def test_a_process_of_betas_steps_as_diffusers_scheduler_does(kind, settings, steps):
    scheduler = kind(**BETAS, **settings)
    scheduler.set_timesteps(steps)
    process = process_of("it", dict(scheduler.config) | {"_class_name": kind.__name__}, learned=False, tokens=16)
    x, noises = start(steps)
    (image, times), (expected, expected_times) = ours(process, steps, x, noises), theirs(scheduler, x, noises)
    if steps == 1 and settings["timestep_spacing"] == "linspace":  # from its last step alone diffusers starts at t = 0
        assert times == expected_times == [0.0]
    assert times == expected_times
    torch.testing.assert_close(image, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("minimum", [True, False])
def test_flow_matching_steps_as_diffusers_euler_does(steps, shift, minimum):
    """With σ left to the scheduler, as SD3's pipeline does, and given as 1 … 1/steps, as FLUX's does."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    even = [1.0 - i / steps for i in range(steps)]
    scheduler.set_timesteps(steps) if minimum else scheduler.set_timesteps(sigmas=even)
    config = dict(scheduler.config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    process = process_of("it", config, learned=False, tokens=16, ends_at_minimum=minimum)
    x, noises = start(steps)
    (image, times), (expected, expected_times) = ours(process, steps, x, noises), theirs(scheduler, x, noises)
    assert times == pytest.approx(expected_times, abs=1e-3)
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_shift_that_depends_on_the_images_tokens_is_diffusers(kind):
    settings = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "time_shift_type": kind}
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    mu = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)  # 1024 tokens on the line through 256 and 4096
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
    config = dict(scheduler.config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    process = process_of("it", config, learned=False, tokens=1024)
    assert process.respace(4).timesteps.flip(0).tolist() == pytest.approx(scheduler.timesteps.tolist(), abs=1e-3)


def test_euler_is_exact_where_the_velocity_is_constant():
    """v = ε − x_0 leads from ε to x_0 in any number of steps."""
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    process = FlowMatching(shift=3.0).respace(5)
    reverse, x = process.reverse(), noise
    for index in reversed(range(5)):
        x = reverse.next(noise - x0, x, torch.full((2,), index), None)
    torch.testing.assert_close(x, x0, rtol=1e-5, atol=1e-5)
    assert process.sigmas[0] == 0 and process.sigmas[-1] == 1
    assert process.sigmas[1].item() == pytest.approx(3 * 0.2 / (1 + 2 * 0.2))


def test_ddim_lands_on_x0_where_the_noise_is_told_exactly():
    schedule = NoiseSchedule.linear()
    schedule = NoiseSchedule(schedule.betas, schedule.timesteps, variance="none").respace(6)
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    x, reverse = schedule.add_noise(x0, noise, torch.tensor([5, 5])), schedule.reverse()
    for index in reversed(range(6)):
        x = reverse.next(noise, x, torch.full((2,), index), None)
    torch.testing.assert_close(x, x0, rtol=1e-4, atol=1e-4)


def test_zero_terminal_snr_leaves_nothing_of_the_signal_and_keeps_the_first_step():
    plain = NoiseSchedule.linear()
    plain = NoiseSchedule(plain.betas, plain.timesteps, "none", "v_prediction")
    mended = plain.zero_terminal_snr
    assert mended.alphas_cumprod[-1] == 0.0
    assert mended.alphas_cumprod[0].item() == pytest.approx(plain.alphas_cumprod[0].item())
    assert math.isclose(mended.respace(4).alphas_cumprod[-1].item(), 0.0)


@pytest.mark.parametrize("kind", [*DDPM, *DDIM])
def test_what_a_config_leaves_unsaid_is_what_diffusers_class_has(kind):
    own = {"set_alpha_to_one": True, "skip_prk_steps": True} if kind == "PNDMScheduler" else {}
    config = {"_class_name": kind} | BETAS | own
    theirs = getattr(diffusers, kind).from_config(config)
    theirs.set_timesteps(10)
    process = process_of("it", config, learned=False, tokens=16)
    times = sorted({round(float(t)) for t in theirs.timesteps})  # PNDM takes one of them twice
    assert process.respace(10).timesteps.tolist() == times
    assert process.spacing.removesuffix(" above 0") == theirs.config.get("timestep_spacing", "linspace")


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, DPMSolverSinglestepScheduler])
def test_a_solver_of_first_order_takes_ddims_steps_at_its_own_timesteps(kind, spacing):
    settings = {"solver_order": 1} | ({} if kind is DPMSolverSinglestepScheduler else {"timestep_spacing": spacing})
    settings |= {"disable_corrector": list(range(10))} if kind is UniPCMultistepScheduler else {}
    scheduler = kind.from_config(BETAS | settings)
    scheduler.set_timesteps(10)
    process = process_of("it", dict(scheduler.config) | {"_class_name": kind.__name__}, learned=False, tokens=16)
    x, noises = start(10)
    (image, times), (expected, expected_times) = ours(process, 10, x, noises), theirs(scheduler, x, noises)
    assert times == expected_times
    torch.testing.assert_close(image, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="steps=1000 of spacing 'l.* above 0' meet a timestep of 1000 twice"):
        replace(process, spacing=f"{spacing if spacing != 'trailing' else 'leading'} above 0").respace(1000)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "flow"}, "prediction_type 'flow' is not supported"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not supported"),
        ({"set_alpha_to_one": False}, "set_alpha_to_one False is not supported"),
        ({"rescale_betas_zero_snr": True}, "it: a terminal SNR of zero .* ε alone"),
        ({"trained_betas": [0.1]}, r"trained_betas \[0.1\] is not supported"),
        ({"thresholding": True}, "thresholding True"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas True"),
        ({"_class_name": "PNDMScheduler"}, "set_alpha_to_one False is not supported"),  # unsaid, it is False there
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, "use_karras_sigmas True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}, "use_lu_lambdas True"),
        ({"_class_name": "DPMSolverSinglestepScheduler", "lambda_min_clipped": -5.1}, "lambda_min_clipped -5.1"),
        ({"_class_name": "UniPCMultistepScheduler", "use_exponential_sigmas": True}, "use_exponential_sigmas True"),
        ({"_class_name": "UniPCMultistepScheduler", "final_sigmas_type": "sigma_min"}, "final_sigmas_type 'sigma_min'"),
        ({"_class_name": "UniPCMultistepScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting True"),
        ({"_class_name": "UniPCMultistepScheduler", "shift_terminal": 0.1}, "shift_terminal 0.1"),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "use_beta_sigmas True"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type 'continuous'"),
        (
            {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"},
            "interpolation_type 'log_linear'",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "sigma_max": 700.0}, "sigma_max 700.0"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas True"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.02}, "shift_terminal 0.02"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_karras_sigmas": True}, "use_karras_sigmas True"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0}, "it: 1000 timesteps, shift 0: need"),
        ({"_class_name": "LCMScheduler"}, "scheduler LCMScheduler has no betas of a DDPM"),
    ],
)
def test_what_a_scheduler_says_is_heeded_or_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        process_of("it", {"_class_name": "DDIMScheduler"} | BETAS | config, learned=False, tokens=16)


def test_sigmas_of_another_spacing_are_refused_with_a_learned_variance_too():
    config = {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True} | BETAS
    with pytest.raises(ValueError, match="use_karras_sigmas True is not supported"):
        process_of("it", config, learned=True, tokens=16)


def test_more_steps_than_were_trained_with_are_refused():
    with pytest.raises(ValueError, match="steps=1001 is outside 1 … 1000"):
        FlowMatching().respace(1001)
    schedule = NoiseSchedule.linear(100)
    schedule = NoiseSchedule(schedule.betas, schedule.timesteps, "none", spacing="leading", offset=50)
    with pytest.raises(ValueError, match="steps=100 from 50 on end at 149"):
        schedule.respace(100)
