"""A pipeline: load it by name, from a folder in diffusers' layout, a hub id, or an original DiT's or SiT's `.pt` file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn

from vqlib.models import folder, original, structure
from vqlib.models.class_conditional import DiT, SiT
from vqlib.models.ddpm import NoiseSchedule
from vqlib.models.denoiser import Denoiser
from vqlib.models.families import Family, class_name, denoiser_for, family_of, model_class
from vqlib.models.flow import FlowMatching
from vqlib.models.process import Process
from vqlib.models.prompts import Prompts
from vqlib.models.schedulers import FLOW, process_of
from vqlib.system.fingerprint import digest

DATA = Path(__file__).resolve().parents[2] / "data"
BUNDLED, BUNDLED_FLOW = "dit-mini-fashion", "sit-mini-emoji"  # the first unless another is named
ORIGINAL_VAE = "stabilityai/sd-vae-ft-ema"  # the one DiT was trained with; an original .pt file holds none
PROMPTS = "prompts.safetensors"  # in the folder of a text-to-image model
ORIGINALS = {"dit": (DiT(), NoiseSchedule.linear()), "sit": (SiT(original=True), FlowMatching())}  # of a `.pt` file


@dataclass(frozen=True)
class Pipeline:
    """A conditional latent diffusion or flow model: everything sampling and calibration need, in eval mode.

    Raises ValueError where its parts do not fit: no row for "no class", another number of classes or latent channels, no
    learned variance where the process counts on one, a transformer that no adapter knows.
    """

    name: str
    transformer: nn.Module
    vae: AutoencoderKL
    schedule: Process  # in all of its steps
    class_names: tuple[str, ...]  # what can be asked for by number: classes, or prompts
    denoiser: Denoiser | None = None  # how the transformer is driven; None: as its class is known
    loaded_with: Mapping[str, Any] = field(default_factory=dict, compare=False)  # what `load` was asked besides

    def __post_init__(self) -> None:
        transformer = structure.unwrapped(self.transformer)
        if self.denoiser is None:
            flow = isinstance(self.schedule, FlowMatching)
            object.__setattr__(self, "denoiser", denoiser_for(self.name, transformer, flow))
        _require_fitting(self, transformer)

    @property
    def null_class(self) -> int:
        """The condition that stands for "none" in classifier-free guidance: the one after the last."""
        return len(self.class_names)

    def identity(self) -> dict[str, Any]:
        """What outputs depend on besides weights, JSON-safe: denoiser and prompts, number of conditions, process."""
        process = {k: _told(v) for k, v in vars(self.schedule).items() if not isinstance(v, torch.device)}
        return {
            "denoiser": {"class": type(self.denoiser).__name__} | self.denoiser.identity(),
            "conditions": len(self.class_names),
            "process": {"class": type(self.schedule).__name__} | process,
        }

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one latent."""
        return self.denoiser.latent_shape(structure.unwrapped(self.transformer))

    def output(
        self, x: Tensor, timestep: Tensor, labels: Tensor, guidance_scale: float, model: nn.Module | None = None
    ) -> Tensor:
        """The output float32 [R, C or 2C, h, w] for latents [R, C, h, w], model times [R] and conditions [R].

        What of it is beyond the latents' channels is a variance, and left away where the process has one of its own. `model`:
        another than this pipeline's, of the same family.
        """
        model = self.transformer if model is None else model
        x = x.to(structure.input_dtype(model))
        output = self.denoiser.forward(model, x, timestep, labels, guidance_scale).float()
        return output if _learned(self.schedule) else output[:, : x.shape[1]]

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
    family: str = "dit",
    prompts: Prompts | str | Path | Sequence[str] | None = None,
) -> Pipeline:
    """Load `dit-mini-fashion` or `sit-mini-emoji` (bundled), a folder in diffusers' layout, a hub id such as `facebook/DiT-XL-2-256`, or
    the original `DiT-XL-2-256x256.pt`, whose VAE is then the folder or hub id `vae`.

    `device`: "cpu", "cuda:1", … or "auto", the GPU where there is one. Weights are widened to float32 unless `dtype` says
    otherwise; a folder that holds only one variant (fp16, …) serves. `family`: of a `.pt` file, "dit" or "sit", which look
    alike. `prompts`, for a text-to-image model: what `Prompts.save` wrote, by default `prompts.safetensors` in the folder, or
    texts, which need the folder's text encoders and the transformers package. Raises FileNotFoundError naming what was looked for where a folder is incomplete, ValueError
    naming the first wrong key of a `.pt` file, a setting of the folder's that is not supported, or a device that is not here.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is none of torch's floating types")
    if family not in ORIGINALS:
        raise ValueError(f"family {family!r} is not one of {', '.join(ORIGINALS)}")
    device, path = device_of(device), Path(name).expanduser()
    single = path.suffix == ".pt" or path.is_file()
    pipe = _load_original(path, vae, family) if single else _load_folder(name, prompts)
    if dtype != torch.float32:  # diffusers has something to say of every cast
        pipe.transformer.to(dtype)
    named = None if isinstance(prompts, Prompts) else prompts  # tensors are not to be handed from process to process
    asked = {"vae": str(vae), "dtype": dtype, "family": family, "prompts": named}
    return replace(pipe.to(device), loaded_with=asked)


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


def _load_folder(name: str | Path, prompts: Prompts | str | Path | Sequence[str] | None) -> Pipeline:
    bundled = DATA / str(name)
    path = bundled if (bundled / folder.PARTS[0]).is_file() else Path(name).expanduser()
    source = str(path) if path.is_dir() else str(name)
    if path.is_dir():
        folder.require_complete(path)
    elif str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{name!r} is neither a bundled model ({BUNDLED}, {BUNDLED_FLOW}), a folder here, nor a hub id 'owner/name'"
        )
    index, *configs, scheduler = (folder.read_json(source, part) for part in folder.PARTS)
    kind, flow = class_name(source, configs[0]), scheduler.get("_class_name") == FLOW
    family = family_of(source, kind, flow)
    folder.require_supported(source, *configs)
    learned = _learns_variance(configs[0]) and family.encode is None
    process_of(source, scheduler, learned, 1, family.ends_at_minimum)  # refused before weights are read
    prompts = _prompts(source, family, prompts) if family.encode else None
    transformer = structure.with_fast_products(folder.read_model(model_class(kind), source, "transformer"))
    vae = folder.read_model(AutoencoderKL, source, "vae")
    if prompts is None:
        denoiser, names = family.denoiser(), folder.class_names(source, index, transformer.config.num_embeds_ada_norm)
    else:
        denoiser, names = family.denoiser(prompts), prompts.texts
    _, height, width = denoiser.latent_shape(transformer)
    tokens = height * width // 4  # of patches of 2 × 2
    schedule = process_of(source, scheduler, learned, tokens, family.ends_at_minimum)
    return Pipeline(str(name), transformer, vae, schedule, names, denoiser)


def _prompts(source: str, family: Family, prompts: Prompts | str | Path | Sequence[str] | None) -> Prompts:
    if isinstance(prompts, Prompts):
        return prompts
    if isinstance(prompts, (str, Path)):
        return Prompts.load(prompts)
    if not prompts and (beside := Path(source) / PROMPTS).is_file():
        return Prompts.load(beside)
    if not prompts:
        raise ValueError(
            f"{source} takes prompts: give prompts= a file of them, or texts, or put {PROMPTS} into the folder"
        )
    try:
        encoders = DiffusionPipeline.from_pretrained(source, transformer=None, vae=None)
    except ImportError as error:
        raise ValueError(f"{source}: texts need the transformers package ({error}); give prompts= a file") from None
    with torch.no_grad():
        return family.encode(encoders, prompts)


def _load_original(path: Path, vae: str | Path, family: str) -> Pipeline:
    """A pipeline around an original transformer: its family's own process, classes by number."""
    transformer = structure.with_fast_products(original.read_transformer(path))
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
    denoiser, schedule = ORIGINALS[family]
    return Pipeline(str(path), transformer, decoder, schedule, names, denoiser)


def _told(value: Any) -> Any:
    """A field of a process as JSON has it; a tensor by SHA-256, in float32: float64's last bits differ by machine."""
    if isinstance(value, Tensor):
        return digest([("", value.float())])
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _learned(process: Process) -> bool:
    return getattr(process, "variance", None) == "learned"


def _learns_variance(config: dict) -> bool:
    return config.get("out_channels") == 2 * config.get("in_channels", 4)


def _require_fitting(pipe: Pipeline, transformer: nn.Module) -> None:
    pipe.denoiser.require_fitting(pipe.name, transformer, len(pipe.class_names))
    channels = pipe.latent_shape[0]
    config = getattr(transformer, "config", None)
    if _learned(pipe.schedule) and config is not None and not _learns_variance(config):
        out = config.get("out_channels")
        raise ValueError(
            f"{pipe.name}: out_channels {out} for in_channels {channels}; a learned variance needs {2 * channels}"
        )
    if pipe.vae is not None and pipe.vae.config.latent_channels != channels:
        raise ValueError(
            f"{pipe.name}: the VAE has {pipe.vae.config.latent_channels} latent channels, the transformer {channels}"
        )
