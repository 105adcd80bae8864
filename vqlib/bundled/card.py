"""The bundled model's figures and its model card: measured here, written down with every condition."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from vqlib.bundled import export, recipes
from vqlib.bundled.training import Progress, TrainConfig
from vqlib.evaluation.evaluate import Metrics, evaluate
from vqlib.evaluation.extractors import load_extractor
from vqlib.evaluation.fashion_dataset import to_model
from vqlib.evaluation.references import Reference, make_reference
from vqlib.figures import tables
from vqlib.models.sampling import to_uint8
from vqlib.system.files import write_bytes

REFERENCE = "reference-fashion-mnist-test.safetensors"
BOOTSTRAP = 200  # resamples behind the interval of every FD


@torch.inference_mode()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Share of uint8 images [N, 1, 32, 32] classified as their labels [N]."""
    guesses = torch.cat([classifier(to_model(part)).argmax(1) for part in images.split(batch)])
    return (guesses == labels.to(guesses.device)).float().mean().item()


def reference(test_images: Tensor, target: str | Path) -> Reference:
    """Statistics and features of the test images by the classifier in `target`, written beside it."""
    target = Path(target)
    extractor = load_extractor("fashion", weights=target / "classifier.safetensors", device=test_images.device)
    return make_reference(test_images, extractor, target / REFERENCE, name="fashion-mnist-test", cache=None)


@torch.inference_mode()
def through_vae(vae: AutoencoderKL, images: Tensor, batch: int = 500) -> Tensor:
    """uint8 images encoded and decoded, with no diffusion in between."""
    decoded = [vae.decode(latents).sample for latents in export.encode(vae, images).split(batch)]
    return to_uint8(torch.cat(decoded))


def row(name: str, metrics: Metrics) -> dict:
    """One line of the card's table: which images, against the 10,000 test images."""
    values = metrics.to_row(**{"images against the test images": name})
    return {k: v for k, v in values.items() if k not in ("reference", "extractor", "device", "minutes")}


def real_row(name: str, images: Tensor, labels: Tensor, target: str | Path) -> dict:
    """The line of a set of uint8 images that no model generated."""
    extractor = load_extractor("fashion", weights=Path(target) / "classifier.safetensors", device=images.device)
    return row(name, evaluate(images, Path(target) / REFERENCE, extractor, labels, bootstrap=BOOTSTRAP, cache=None))


def write(
    target: str | Path,
    runs: dict[str, Progress],
    configs: dict[str, TrainConfig],
    table: pd.DataFrame,
    sampling: str,
    test_accuracy: float,
    notes: str = "",
) -> Path:
    """`MODEL_CARD.md` in `target`: what it is, how it was trained, how good it is, and under which licence."""
    trained = pd.DataFrame(
        {
            "training": name,
            "parameters": parameters,
            "steps": runs[name].step,
            "batch": configs[name].batch,
            "images seen": runs[name].images,
            "learning rate": configs[name].lr,
            "EMA": configs[name].ema,
            "seed": configs[name].seed,
            "minutes": runs[name].minutes,
        }
        for name, parameters in _parameters().items()
    )
    text = f"""# dit-mini-fashion

A class-conditional latent Diffusion Transformer on Fashion-MNIST, small enough to study quantization on a laptop and in
DiT-XL/2's form: patch 2, adaLN-Zero, learned variance, label dropout for classifier-free guidance, a VAE in front.
The DiT has 6 blocks of width 192 on 16 tokens; images are 1×32×32 (28×28 padded with black), latents 4×8×8.

## Training

{tables.markdown(trained, formats={"learning rate": ".0e", "EMA": ".4f", "minutes": ".1f"})}

`notebooks/90_train_bundled_model.ipynb` trains them from nothing, in this order; what each of them minimizes is in `vqlib/fashion/recipes.py`.{notes}

## Figures

Classifier: {test_accuracy:.2%} of the real test images. {sampling}
FD (with its 95 % bootstrap interval), IS, precision and recall are in the classifier's 128 features (float64 statistics), so
they are not FID and compare only with each other. The first row is the floor: real images of the other split.

{tables.markdown(table)}

## Data and licence

Fashion-MNIST, Zalando Research, MIT licence (`DATA_LICENSE`). The weights are under the project's licence.
"""
    return write_bytes(Path(target) / "MODEL_CARD.md", text.encode())


def _parameters() -> dict[str, int]:
    vae, dit = recipes.build_vae(), recipes.build_dit()
    trained = {"classifier": recipes.build_classifier(), "vae": vae, "decoder": recipes.decoder_of(vae)}
    trained |= {"dit": dit, "dit-continued": dit}
    return {name: sum(p.numel() for p in network.parameters()) for name, network in trained.items()}
