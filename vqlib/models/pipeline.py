"""A pipeline: load it by name, from a folder in diffusers' layout, a hub id, or an original DiT's `.pt` file."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch import Tensor, nn

from vqlib.models import original
from vqlib.models.ddpm import NoiseSchedule
from vqlib.models.dit import with_fast_products

DATA = Path(__file__).resolve().parents[2] / "data"
BUNDLED = "dit-mini-fashion"
ORIGINAL_VAE = "stabilityai/sd-vae-ft-ema"  # the one DiT was trained with; an original .pt file holds none


@dataclass(frozen=True)
class Pipeline:
    """A class-conditional latent diffusion model: everything sampling and calibration need, in eval mode."""

    name: str
    transformer: nn.Module
    vae: AutoencoderKL
    schedule: NoiseSchedule  # the full training schedule, T steps
    class_names: tuple[str, ...]

    @property
    def null_class(self) -> int:
        """The label that stands for 'no class' in classifier-free guidance: the one after the last class."""
        return len(self.class_names)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one latent."""
        config = self.transformer.config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def with_transformer(self, transformer: nn.Module) -> Pipeline:
        """The same pipeline around another transformer, for example a packed one."""
        return replace(self, transformer=transformer.eval())

    def to(self, device: torch.device | str) -> Pipeline:
        """Move transformer and VAE (in place, as torch does) to a device."""
        return replace(self, transformer=self.transformer.to(device), vae=self.vae.to(device))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images float [B, C', H, W], about −1 … 1."""
        return self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample


def load(
    name: str | Path = BUNDLED,
    vae: str | Path = ORIGINAL_VAE,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Pipeline:
    """Load `dit-mini-fashion` (bundled), a folder in diffusers' layout, a hub id such as `facebook/DiT-XL-2-256`, or
    the original `DiT-XL-2-256x256.pt`, whose VAE is then the folder or hub id `vae`.

    `device`: "cpu", "cuda:1", … or "auto", the GPU where there is one. Weights are widened to float32 unless `dtype` says
    otherwise; a folder that holds only the fp16 variant serves. Raises FileNotFoundError naming what was looked for where a
    folder is incomplete, ValueError naming the first wrong key of a `.pt` file, a setting of the folder's that is not
    supported, or a device that is not here.
    """
    device = device_of(device)
    if str(name).endswith(".pt"):
        pipe = _load_original(Path(name).expanduser(), vae)
    else:
        pipe = _load_folder(name)
    return replace(pipe, transformer=pipe.transformer.to(dtype)).to(device)


def device_of(name: str | torch.device) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one. ValueError where it is not here."""
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is no device; known are auto, cpu and cuda") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device {name!r} is not here: there are {count} CUDA devices")
    return device


def _load_folder(name: str | Path) -> Pipeline:
    bundled = DATA / str(name)
    folder = bundled if bundled.is_dir() else Path(name).expanduser()
    source = str(folder) if folder.is_dir() else str(name)
    if folder.is_dir():
        _require_complete(folder)
    elif str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{name!r} is neither a bundled model ({BUNDLED}), a folder here, nor a hub id 'owner/name'"
        )
    require_supported(source, _read_json(source, "transformer/config.json"))
    schedule = _schedule(source)
    transformer = DiTTransformer2DModel.from_pretrained(
        source, subfolder="transformer", **_weights(folder / "transformer")
    )
    vae = AutoencoderKL.from_pretrained(source, subfolder="vae", **_weights(folder / "vae"))
    _require_classes(source, transformer)
    return Pipeline(
        name=str(name),
        transformer=with_fast_products(transformer.eval().requires_grad_(False)),
        vae=vae.eval().requires_grad_(False),
        schedule=schedule,
        class_names=_class_names(source, transformer.config.num_embeds_ada_norm),
    )


def _weights(folder: Path) -> dict:
    """How diffusers is to read a part's weights: widened, and by the fp16 variant where it is the only one."""
    options = {"torch_dtype": torch.float32}
    files = {path.name for path in folder.glob("diffusion_pytorch_model*")} if folder.is_dir() else set()
    plain = any(".fp16." not in name for name in files)
    return options if plain or not files else options | {"variant": "fp16"}


def _load_original(path: Path, vae: str | Path) -> Pipeline:
    """A pipeline around an original transformer: DiT's own schedule, classes by number."""
    transformer = with_fast_products(original.read_transformer(path))
    subfolder = "vae" if (Path(vae) / "vae" / "config.json").is_file() else None
    try:
        decoder = AutoencoderKL.from_pretrained(str(vae), subfolder=subfolder, torch_dtype=torch.float32)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{path} holds no VAE, and the VAE {str(vae)!r} is neither a folder here nor could it be fetched ({reason}); "
            "give vae= a folder with an AutoencoderKL or a whole pipeline"
        ) from None
    names = tuple(str(i) for i in range(transformer.config.num_embeds_ada_norm))
    decoder = decoder.eval().requires_grad_(False)
    return Pipeline(str(path), transformer, decoder, NoiseSchedule.linear(), names)


def _require_complete(folder: Path) -> None:
    for part in ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        if not (folder / part).is_file():
            raise FileNotFoundError(f"{folder} is not a complete diffusers pipeline: {part} is missing")


def _read_json(source: str, part: str) -> dict:
    path = Path(source) / part
    if not path.exists():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(source, part))
    return json.loads(path.read_text())


def require_supported(source: str, config: dict) -> None:
    """Raises ValueError, naming the setting, where a transformer's config.json asks for what is not supported here."""
    if config.get("_class_name", "DiTTransformer2DModel") != "DiTTransformer2DModel":
        raise ValueError(
            f"{source}: the transformer is a {config['_class_name']}; only DiTTransformer2DModel can be loaded"
        )
    channels, out = config.get("in_channels", 4), config.get("out_channels")
    if out != 2 * channels:
        raise ValueError(
            f"{source}: out_channels {out} for in_channels {channels}; a learned variance needs {2 * channels}"
        )
    for key, wanted in (("norm_type", "ada_norm_zero"), ("attention_bias", True)):
        if config.get(key, wanted) != wanted:
            raise ValueError(f"{source}: {key} {config[key]!r} is not supported, only {wanted!r}")


SCHEDULE = {  # what a scheduler's config may ask for beside its betas, and what it then has to be
    "prediction_type": ("epsilon",),
    "beta_schedule": ("linear",),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False,),
    "thresholding": (False,),
    "steps_offset": (0,),
}


def _schedule(source: str) -> NoiseSchedule:
    """The training schedule of a folder; raises ValueError naming the scheduler or the setting that is not supported."""
    config = _read_json(source, "scheduler/scheduler_config.json")
    kind = str(config.get("_class_name", "DDPMScheduler"))
    if "Flow" in kind or not {"num_train_timesteps", "beta_start", "beta_end"} <= config.keys():
        raise ValueError(
            f"{source}: scheduler {kind} has no betas (num_train_timesteps, beta_start, beta_end): no DDPM"
        )
    for key, allowed in SCHEDULE.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{source}: {key} {config[key]!r} is not supported, only {allowed[0]!r}")
    return NoiseSchedule.linear(config["num_train_timesteps"], config["beta_start"], config["beta_end"])


def _require_classes(source: str, transformer: nn.Module) -> None:
    """The class table needs a row for "no class" behind the classes: guidance and calibration ask for it."""
    table = transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
    classes = transformer.config.num_embeds_ada_norm
    if table.num_embeddings != classes + 1:
        raise ValueError(
            f"{source}: {table.num_embeddings} rows for {classes} classes: the one for no class is missing"
        )


def _class_names(source: str, count: int) -> tuple[str, ...]:
    labels = _read_json(source, "model_index.json").get("id2label") or {}
    beyond = [key for key in labels if not str(key).isdigit() or int(key) >= count]
    if beyond:
        raise ValueError(
            f"{source}: id2label names class {beyond[0]!r}, but the transformer has classes 0 … {count - 1}"
        )
    return tuple(str(labels.get(str(i), i)) for i in range(count))
