"""Trained networks -> a bundled model's folder: a diffusers pipeline, and the classifier beside it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from vqlib.bundled.subjects import Subject
from vqlib.evaluation.classifier import to_model
from vqlib.system.files import write_bytes, write_tensors


def trained(network: nn.Module, name: str, folder: str | Path) -> nn.Module:
    """`network` with the moving-average weights of the training called `name` in `folder`, in eval mode."""
    state = load_file(Path(folder) / f"{name}.safetensors")
    network.load_state_dict({key[4:]: value for key, value in state.items() if key.startswith("ema.")})
    return network.eval()


@torch.no_grad()  # not inference mode: trainings start from these tensors
def posterior(vae: AutoencoderKL, images: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of uint8 images [N, C, 32, 32] as latents float32 [N, c, 8, 8], not yet scaled."""
    parts = [vae.encode(to_model(part)).latent_dist for part in images.split(batch)]
    return torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])


def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """The posterior's means alone."""
    return posterior(vae, images)[0]


def export_vae(vae: AutoencoderKL, scaling_factor: float, target: str | Path) -> None:
    """`vae/` in half precision; latents times `scaling_factor` have unit variance."""
    vae.register_to_config(scaling_factor=scaling_factor)
    vae.half().save_pretrained(Path(target) / "vae")
    vae.float()


def export_dit(dit: DiTTransformer2DModel, target: str | Path) -> None:
    """`transformer/` in half precision, with the conditioning network copied into every block as diffusers expects it."""
    whole = DiTTransformer2DModel.from_config(dit.config)
    whole.load_state_dict(dit.state_dict())
    whole.half().save_pretrained(Path(target) / "transformer")


def export_classifier(classifier: nn.Module, target: str | Path) -> None:
    """`classifier.safetensors` in half precision; evaluation widens it again."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in classifier.state_dict().items()}
    write_tensors(Path(target) / "classifier.safetensors", state)


def export_indices(subject: Subject, target: str | Path) -> None:
    """`model_index.json` and `scheduler/`, which make the folder one that DiTPipeline opens."""
    target = Path(target)
    index = {
        "_class_name": "DiTPipeline",
        "scheduler": ["diffusers", subject.scheduler["_class_name"]],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "id2label": {str(i): name for i, name in enumerate(subject.classes)},
    }
    write_bytes(target / "model_index.json", (json.dumps(index, indent=2) + "\n").encode())
    scheduler = (json.dumps(subject.scheduler, indent=2) + "\n").encode()
    write_bytes(target / "scheduler" / "scheduler_config.json", scheduler)
