"""What a scheduler_config.json says of the process a model was trained for: heeded, or refused by name.

What it leaves unsaid is what diffusers' class of that name has. Of a solver, order and kind of its steps are not taken over;
nothing is clipped (see `sampling`).
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import diffusers
import torch

from vqlib.models.ddpm import NoiseSchedule
from vqlib.models.flow import FlowMatching, shifted
from vqlib.models.process import Process

FLOW = "FlowMatchEulerDiscreteScheduler"
DDPM = ("DDPMScheduler", "DDPMParallelScheduler")
SOLVERS = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler")
DDIM = (  # whose betas are a DDPM's; solvers of the same equation, all sampled by DDIM's step, the one of first order
    *("DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler"),
    *SOLVERS,
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
)
EVEN = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), (False, None))
NEVER = EVEN | {"trained_betas": (None,), "thresholding": (False,), "use_lu_lambdas": (False, None)}
LEARNED = NEVER | {  # with a learned variance, whatever sampler the folder names
    "prediction_type": ("epsilon",),
    "rescale_betas_zero_snr": (False,),
    "steps_offset": (0,),
    "variance_type": ("learned_range", "fixed_small", None),  # the last two are what diffusers writes unasked
    "timestep_spacing": ("linspace", "leading"),  # so is "leading"; DiT's own respacing is from first to last
}
FIXED = NEVER | {
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "set_alpha_to_one": (True,),
    "variance_type": ("fixed_small", "fixed_large", None, "learned_range"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
    "final_sigmas_type": ("zero",),
    "lambda_min_clipped": (-math.inf,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
}
STRAIGHT = EVEN | {
    "invert_sigmas": (False,),
    "shift_terminal": (None, 0, False),
    "stochastic_sampling": (False,),
    "time_shift_type": ("exponential", "linear"),
}


def process_of(source: str, config: dict, learned: bool, tokens: int, ends_at_minimum: bool = False) -> Process:
    """The process a scheduler's config stands for. ValueError naming the scheduler or the setting that is not supported.

    learned: the model gives a variance. tokens: of an image, for a shift that depends on them. ends_at_minimum: σ falls to the
    smallest one trained with, as where a pipeline leaves σ to its scheduler, instead of 1/steps.
    """
    kind = config.get("_class_name", DDPM[0])
    if kind == FLOW:
        return _flow(source, config, tokens, ends_at_minimum)
    if kind not in (*DDPM, *DDIM) or not {"num_train_timesteps", "beta_start", "beta_end"} <= config.keys():
        raise ValueError(
            f"{source}: scheduler {kind} has no betas of a DDPM (num_train_timesteps, beta_start, beta_end)"
        )
    given = inspect.signature(getattr(diffusers, kind)).parameters.items()
    config = {name: one.default for name, one in given} | config
    require(source, config, LEARNED if learned else FIXED)
    try:
        schedule = _betas(source, config)
        if learned:
            return schedule
        spacing = config.get("timestep_spacing", "linspace")  # as a solver has it that knows no other
        large = kind in DDPM and config.get("variance_type") == "fixed_large"
        schedule = replace(
            schedule,
            variance="large" if large else "small" if kind in DDPM else "none",
            prediction=config.get("prediction_type", "epsilon"),
            spacing=f"{spacing} above 0" if kind in SOLVERS and spacing != "trailing" else spacing,
            offset=config.get("steps_offset", 0),
        )
        return schedule.zero_terminal_snr if config.get("rescale_betas_zero_snr") else schedule
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(source) else f"{source}: {error}") from None


def require(source: str, config: dict, allowed: dict[str, tuple]) -> None:
    """Raises ValueError for the first setting of a config that is none of the allowed; unsaid ones are the first."""
    for key, values in allowed.items():
        if (found := config.get(key, values[0])) not in values:
            raise ValueError(f"{source}: {key} {found!r} is not supported, only {', '.join(map(repr, values))}")


def _betas(source: str, config: dict) -> NoiseSchedule:
    total, start, end = (config[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
    schedule, kind = NoiseSchedule.linear(total, start, end), config.get("beta_schedule", "linear")
    if kind == "linear":
        return schedule
    if kind == "scaled_linear":
        root = torch.linspace(math.sqrt(start), math.sqrt(end), total, dtype=torch.float64)
        return replace(schedule, betas=root.square())
    if kind == "squaredcos_cap_v2":  # Nichol & Dhariwal (2021), eq. 17; betas of at most 0.999
        time = torch.arange(total + 1, dtype=torch.float64) / total
        abar = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
        return replace(schedule, betas=(1.0 - abar[1:] / abar[:-1]).clamp(max=0.999))
    raise ValueError(
        f"{source}: beta_schedule {kind!r} is not supported, only 'linear', 'scaled_linear', 'squaredcos_cap_v2'"
    )


def _flow(source: str, config: dict, tokens: int, ends_at_minimum: bool) -> FlowMatching:
    require(source, config, STRAIGHT)
    total, shift = config.get("num_train_timesteps", 1000), config.get("shift", 1.0)
    lowest = None
    try:
        if config.get("use_dynamic_shifting"):
            shift = _shift_of(config, tokens)
            lowest = 1.0 / total if ends_at_minimum else None
        elif ends_at_minimum:
            lowest = shifted(1.0 / total, shift)  # the shift is applied to it once more, as diffusers does
        return FlowMatching(shift, lowest, total, total)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{source}: {error}") from None


def _shift_of(config: dict, tokens: int) -> float:
    """The shift of an image of so many tokens: μ, or e^μ, with μ on a line through two numbers of tokens."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - few) / (many - few)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
