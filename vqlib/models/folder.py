"""What a folder in diffusers' layout (or a hub id) says of its model: heeded, or refused by name; weights whole or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vqlib.models.ddpm import NoiseSchedule

PARTS = ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
WEIGHTS = re.compile(r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.(?:safetensors|bin)")
DIT = "DiTTransformer2DModel"
LEGACY = "Transformer2DModel"  # the class of the hub's DiT-XL/2, by its norm_type one of several families
SCHEDULERS = (  # whose betas are a DDPM's; the sampler they stand for is not used
    *("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
)
SCHEDULE = {  # what a scheduler may say beside its betas, what it does not say being the first
    "prediction_type": ("epsilon",),
    "beta_schedule": ("linear",),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False,),
    "thresholding": (False,),
    "steps_offset": (0,),
    "variance_type": ("learned_range", "fixed_small", None),  # the last two are what diffusers writes unasked
    "timestep_spacing": ("linspace", "leading"),  # so is "leading"; DiT's own respacing is from first to last
}


def require_complete(folder: Path) -> None:
    """Raises FileNotFoundError naming the first part that a folder lacks."""
    for part in PARTS:
        if not (folder / part).is_file():
            raise FileNotFoundError(f"{folder} is not a complete diffusers pipeline: {part} is missing")


def require_supported(source: str, transformer: dict, vae: dict) -> None:
    """Raises ValueError, naming the setting, where a config.json asks for what is not supported here."""
    kind = transformer.get("_class_name", DIT)
    if kind not in (DIT, LEGACY):
        raise ValueError(f"{source}: the transformer is a {kind}; only {DIT} can be loaded")
    norm = "ada_norm_zero" if kind == DIT else "layer_norm"
    _require(source, transformer, {"norm_type": ("ada_norm_zero",)}, norm_type=norm)
    _require(source, transformer, {"attention_bias": (True,)})
    require_learned_variance(source, transformer.get("in_channels", 4), transformer.get("out_channels"))
    if vae.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise ValueError(f"{source}: the VAE is a {vae['_class_name']}; only AutoencoderKL can be loaded")
    _require(source, vae, {"latents_mean": (None,), "latents_std": (None,)})


def require_learned_variance(source: str, channels: int, out: int | None) -> None:
    """Raises ValueError where a transformer's output is ε alone."""
    if out != 2 * channels:
        raise ValueError(
            f"{source}: out_channels {out} for in_channels {channels}; a learned variance needs {2 * channels}"
        )


def schedule_of(source: str, config: dict) -> NoiseSchedule:
    """The training schedule a scheduler_config.json stands for. ValueError naming the scheduler or what is not supported."""
    kind = config.get("_class_name", SCHEDULERS[0])
    if kind not in SCHEDULERS or not {"num_train_timesteps", "beta_start", "beta_end"} <= config.keys():
        raise ValueError(
            f"{source}: scheduler {kind} has no betas of a DDPM (num_train_timesteps, beta_start, beta_end)"
        )
    _require(source, config, SCHEDULE)
    try:
        return NoiseSchedule.linear(config["num_train_timesteps"], config["beta_start"], config["beta_end"])
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def class_names(source: str, index: dict, count: int) -> tuple[str, ...]:
    """The names in model_index.json, a class's number where it has none."""
    labels = index.get("id2label") or {}
    if not isinstance(labels, dict):
        raise ValueError(f"{source}: id2label is a {type(labels).__name__}, expected names by class number")
    beyond = [key for key in labels if not str(key).isdecimal() or int(key) >= count]
    if beyond:
        raise ValueError(
            f"{source}: id2label names class {beyond[0]!r}, but the transformer has classes 0 … {count - 1}"
        )
    return tuple(str(labels.get(str(i), i)) for i in range(count))


def read_json(source: str, part: str) -> dict:
    """A JSON object of a folder or hub id. FileNotFoundError, ValueError where it is not there or damaged."""
    path = Path(source) / part
    try:
        if not path.exists():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(source, part))
        values = json.loads(path.read_text())
    except OSError as error:
        raise FileNotFoundError(f"{source}: {part} could not be fetched ({_first_line(error)})") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def read_model(kind: type[nn.Module], source: str, part: str | None) -> nn.Module:
    """One part's model, float32, in eval mode: every tensor is in its file, and every tensor of the file in the model.

    A folder that holds weights of one variant only (fp16, ema, …) serves. Raises FileNotFoundError where there are none, and
    ValueError where they are damaged or not those of the config.
    """
    folder, here = f"{source}/{part}" if part else source, Path(source).is_dir()
    options = {"subfolder": part, "torch_dtype": torch.float32, "output_loading_info": True}
    options["variant"] = _variant(Path(folder)) if here else None
    try:
        model, info = kind.from_pretrained(source, **options)
    except (OSError, ValueError, RuntimeError) as error:
        if here:
            raise ValueError(f"{folder}: the weights cannot be read ({_first_line(error)})") from None
        raise FileNotFoundError(f"{folder} could not be fetched ({_first_line(error)})") from None
    for what, problem in (
        ("missing", "is missing in the weights"),
        ("unexpected", "belongs to no model of this config"),
    ):
        if names := sorted(info[f"{what}_keys"]):
            raise ValueError(f"{folder}: {names[0]} {problem} ({len(names)} {what} in all)")
    return model.eval().requires_grad_(False)


def _variant(folder: Path) -> str | None:
    """The variant of the weights in a folder, None for the plain ones."""
    matches = [match for path in folder.iterdir() if (match := WEIGHTS.fullmatch(path.name))]
    found = sorted({match[1] or match[2] or "" for match in matches})
    if not found:
        raise FileNotFoundError(f"{folder} holds no weights (diffusion_pytorch_model*.safetensors)")
    if len(found) > 1 and "" not in found:
        raise ValueError(f"{folder} holds weights of several variants and none plain: {', '.join(found)}")
    return found[0] or None


def _require(source: str, config: dict, allowed: dict[str, tuple], **unsaid: Any) -> None:
    for key, values in allowed.items():
        if (found := config.get(key, unsaid.get(key, values[0]))) not in values:
            raise ValueError(f"{source}: {key} {found!r} is not supported, only {', '.join(map(repr, values))}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
