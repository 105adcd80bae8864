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


def load(name: str | Path = BUNDLED, vae: str | Path = ORIGINAL_VAE) -> Pipeline:
    """Load `dit-mini-fashion` (bundled), a folder in diffusers' layout, a hub id such as `facebook/DiT-XL-2-256`, or
    the original `DiT-XL-2-256x256.pt`, whose VAE is then the folder or hub id `vae`.

    Weights are widened to float32. Raises FileNotFoundError naming what was looked for where a folder is incomplete,
    ValueError naming the first wrong key of a `.pt` file.
    """
    if str(name).endswith(".pt"):
        return _load_original(Path(name), vae)
    bundled = DATA / str(name)
    folder = bundled if bundled.is_dir() else Path(name)
    source = str(folder) if folder.is_dir() else str(name)
    if folder.is_dir():
        _require_complete(folder)
    elif str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{name!r} is neither a bundled model ({BUNDLED}), a folder here, nor a hub id 'owner/name'"
        )
    transformer = DiTTransformer2DModel.from_pretrained(source, subfolder="transformer", torch_dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(source, subfolder="vae", torch_dtype=torch.float32)
    return Pipeline(
        name=str(name),
        transformer=with_fast_products(transformer.eval().requires_grad_(False)),
        vae=vae.eval().requires_grad_(False),
        schedule=_schedule(source),
        class_names=_class_names(source, transformer.config.num_embeds_ada_norm),
    )


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


def _schedule(source: str) -> NoiseSchedule:
    config = _read_json(source, "scheduler/scheduler_config.json")
    if config.get("beta_schedule", "linear") != "linear":
        raise ValueError(f"{source}: beta_schedule {config['beta_schedule']!r} is not supported, only 'linear'")
    return NoiseSchedule.linear(config["num_train_timesteps"], config["beta_start"], config["beta_end"])


def _class_names(source: str, count: int) -> tuple[str, ...]:
    labels = _read_json(source, "model_index.json").get("id2label", {})
    return tuple(str(labels.get(str(i), i)) for i in range(count))
