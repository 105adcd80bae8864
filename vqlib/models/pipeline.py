"""A pipeline: load it by name, from a folder in diffusers' layout, a hub id, or an original DiT's `.pt` file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch import Tensor, nn

from vqlib.models import dit, folder, original
from vqlib.models.ddpm import NoiseSchedule

DATA = Path(__file__).resolve().parents[2] / "data"
BUNDLED = "dit-mini-fashion"
ORIGINAL_VAE = "stabilityai/sd-vae-ft-ema"  # the one DiT was trained with; an original .pt file holds none


@dataclass(frozen=True)
class Pipeline:
    """A class-conditional latent diffusion model: everything sampling and calibration need, in eval mode.

    Raises ValueError where its parts do not fit: no learned variance, no row for "no class", another number of classes or
    latent channels.
    """

    name: str
    transformer: nn.Module
    vae: AutoencoderKL
    schedule: NoiseSchedule  # the full training schedule, T steps
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        _require_fitting(self.name, dit.unwrapped(self.transformer), self.vae, len(self.class_names))

    @property
    def null_class(self) -> int:
        """The label that stands for 'no class' in classifier-free guidance: the one after the last class."""
        return len(self.class_names)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one latent."""
        config = dit.unwrapped(self.transformer).config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def with_transformer(self, transformer: nn.Module) -> Pipeline:
        """The same pipeline around another transformer, for example a packed one.

        It is put into eval mode and moved to this pipeline's device, in place, as torch does.
        """
        here = next((p.device for p in transformer.parameters()), None)
        if here != self.device:
            transformer = transformer.to(self.device)
        return replace(self, transformer=transformer.eval())

    def to(self, device: torch.device | str) -> Pipeline:
        """Move transformer and VAE (in place, as torch does) to a device."""
        return replace(self, transformer=self.transformer.to(device), vae=self.vae and self.vae.to(device))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images float [B, C', H, W], about −1 … 1."""
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        shift = getattr(self.vae.config, "shift_factor", None)
        return self.vae.decode(latents + shift if shift else latents).sample


def load(
    name: str | Path = BUNDLED,
    vae: str | Path = ORIGINAL_VAE,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Pipeline:
    """Load `dit-mini-fashion` (bundled), a folder in diffusers' layout, a hub id such as `facebook/DiT-XL-2-256`, or
    the original `DiT-XL-2-256x256.pt`, whose VAE is then the folder or hub id `vae`.

    `device`: "cpu", "cuda:1", … or "auto", the GPU where there is one. Weights are widened to float32 unless `dtype` says
    otherwise; a folder that holds only one variant (fp16, …) serves. Raises FileNotFoundError naming what was looked for where a
    folder is incomplete, ValueError naming the first wrong key of a `.pt` file, a setting of the folder's that is not
    supported, or a device that is not here.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is none of torch's floating types")
    device, path = device_of(device), Path(name).expanduser()
    pipe = _load_original(path, vae) if path.suffix == ".pt" or path.is_file() else _load_folder(name)
    if dtype != torch.float32:  # diffusers has something to say of every cast
        pipe.transformer.to(dtype)
    return pipe.to(device)


def device_of(name: str | torch.device) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one. ValueError where it is not here."""
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is no device; known are auto, cpu and cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device {name!r} is not here: there are {count} CUDA devices")
    return device


def _load_folder(name: str | Path) -> Pipeline:
    bundled = DATA / str(name)
    path = bundled if (bundled / folder.PARTS[0]).is_file() else Path(name).expanduser()
    source = str(path) if path.is_dir() else str(name)
    if path.is_dir():
        folder.require_complete(path)
    elif str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{name!r} is neither a bundled model ({BUNDLED}), a folder here, nor a hub id 'owner/name'"
        )
    index, *configs, scheduler = (folder.read_json(source, part) for part in folder.PARTS)
    folder.require_supported(source, *configs)
    schedule = folder.schedule_of(source, scheduler)
    transformer = folder.read_model(DiTTransformer2DModel, source, "transformer")
    names = folder.class_names(source, index, transformer.config.num_embeds_ada_norm)
    vae = folder.read_model(AutoencoderKL, source, "vae")
    return Pipeline(str(name), dit.with_fast_products(transformer), vae, schedule, names)


def _load_original(path: Path, vae: str | Path) -> Pipeline:
    """A pipeline around an original transformer: DiT's own schedule, classes by number."""
    transformer = dit.with_fast_products(original.read_transformer(path))
    home = Path(vae).expanduser()
    subfolder = "vae" if (home / "vae" / "config.json").is_file() else None
    try:
        decoder = folder.read_model(AutoencoderKL, str(home) if home.is_dir() else str(vae), subfolder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} holds no VAE, and the VAE {str(vae)!r} is neither a folder here nor could it be fetched ({error}); "
            "give vae= a folder with an AutoencoderKL or a whole pipeline"
        ) from None
    names = tuple(str(i) for i in range(transformer.config.num_embeds_ada_norm))
    return Pipeline(str(path), transformer, decoder, NoiseSchedule.linear(), names)


def _require_fitting(name: str, transformer: nn.Module, vae: AutoencoderKL | None, classes: int) -> None:
    config = getattr(transformer, "config", None)
    if config is None:
        raise ValueError(f"{name}: a {type(transformer).__name__} has no config: it is no DiT of diffusers'")
    channels, known = config.in_channels, config.num_embeds_ada_norm
    folder.require_learned_variance(name, channels, config.out_channels)
    if classes != known:
        raise ValueError(f"{name}: {classes} class names for a transformer of {known} classes")
    for key, module in transformer.named_modules():
        # Guidance and calibration ask for "no class", the row behind the classes.
        if key.endswith("class_embedder.embedding_table") and module.num_embeddings != classes + 1:
            rows = module.num_embeddings
            raise ValueError(f"{name}: {rows} rows for {classes} classes: the one for no class is missing ({key})")
    if vae is not None and vae.config.latent_channels != channels:
        raise ValueError(
            f"{name}: the VAE has {vae.config.latent_channels} latent channels, the transformer {channels}"
        )
