"""What a folder in diffusers' layout (or a hub id) says of its model: heeded, or refused by name; weights whole or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import nn

from vqlib.models.schedulers import require

PARTS = ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
WEIGHTS = re.compile(r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.(?:safetensors|bin)")


def require_complete(folder: Path) -> None:
    """Raises FileNotFoundError naming the first part that a folder lacks."""
    for part in PARTS:
        if not (folder / part).is_file():
            raise FileNotFoundError(f"{folder} is not a complete diffusers pipeline: {part} is missing")


def require_supported(source: str, transformer: dict, vae: dict) -> None:
    """Raises ValueError, naming the setting, where a config.json asks for what is not supported here."""
    if "attention_bias" in transformer:
        require(source, transformer, {"attention_bias": (True,)})
    if vae.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise ValueError(f"{source}: the VAE is a {vae['_class_name']}; only AutoencoderKL can be loaded")
    require(source, vae, {"latents_mean": (None,), "latents_std": (None,)})


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


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
