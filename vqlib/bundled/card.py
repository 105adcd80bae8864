"""A bundled model's figures and its model card: measured here, written down with every condition."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from vqlib.bundled import export
from vqlib.bundled.networks import decoder_of
from vqlib.bundled.subjects import Subject
from vqlib.bundled.training import Progress
from vqlib.evaluation.classifier import to_model
from vqlib.evaluation.evaluate import Metrics, evaluate
from vqlib.evaluation.extractors import KINDS, Extractor, load_extractor
from vqlib.evaluation.references import Reference, make_reference
from vqlib.figures import tables
from vqlib.models.sampling import to_uint8
from vqlib.system.files import write_bytes

BOOTSTRAP = 200  # resamples behind the interval of every FD


@torch.inference_mode()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Share of uint8 images [N, C, 32, 32] classified as their labels [N]."""
    guesses = torch.cat([classifier(to_model(part)).argmax(1) for part in images.split(batch)])
    return (guesses == labels.to(guesses.device)).float().mean().item()


def judge(subject: Subject, target: str | Path, device: torch.device | str = "cpu") -> Extractor:
    """The extractor with the weights of the classifier in `target`."""
    return load_extractor(subject.extractor, weights=Path(target) / "classifier.safetensors", device=device)


def reference_file(subject: Subject, target: str | Path) -> Path:
    """Where the reference stands in a model's folder."""
    return Path(target) / f"reference-{subject.reference}.safetensors"


def reference(subject: Subject, test_images: Tensor, target: str | Path) -> Reference:
    """Statistics and features of the test images by the classifier in `target`, written beside it."""
    extractor = judge(subject, target, test_images.device)
    path = reference_file(subject, target)
    return make_reference(test_images, extractor, path, name=subject.reference, cache=None)


@torch.inference_mode()
def through_vae(vae: AutoencoderKL, images: Tensor, batch: int = 500) -> Tensor:
    """uint8 images encoded and decoded, with no diffusion in between."""
    decoded = [vae.decode(latents).sample for latents in export.encode(vae, images).split(batch)]
    return to_uint8(torch.cat(decoded))


def row(name: str, metrics: Metrics) -> dict:
    """One line of the card's table: which images, against the test images."""
    values = metrics.to_row(**{"images against the test images": name})
    return {k: v for k, v in values.items() if k not in ("reference", "extractor", "device", "minutes")}


def real_row(subject: Subject, name: str, images: Tensor, labels: Tensor, target: str | Path) -> dict:
    """The line of a set of uint8 images that no model generated."""
    extractor, stored = judge(subject, target, images.device), reference_file(subject, target)
    return row(name, evaluate(images, stored, extractor, labels, bootstrap=BOOTSTRAP, cache=None))


def write(
    subject: Subject,
    target: str | Path,
    runs: dict[str, Progress],
    table: pd.DataFrame,
    nearest: pd.DataFrame,
    sampling: str,
    test_accuracy: float,
) -> Path:
    """`MODEL_CARD.md` in `target`: what it is, how it was trained, how good it is, how near to what it saw, and its licence."""
    trained = pd.DataFrame(
        {
            "training": name,
            "parameters": parameters,
            "steps": runs[name].step,
            "batch": config.batch,
            "images seen": runs[name].images,
            "learning rate": config.lr,
            "EMA": config.ema,
            "seed": config.seed,
            "minutes": runs[name].minutes,
        }
        for (name, config), parameters in zip(subject.configs.items(), _parameters(subject), strict=True)
    )
    shares = {column: ".1%" for column in nearest.columns if column.startswith("nearer")}
    text = f"""# {subject.model}

{subject.introduction}

## Training

{tables.markdown(trained, formats={"learning rate": ".0e", "EMA": ".4f", "minutes": ".1f"})}

`notebooks/90_train_bundled_model.ipynb` trains them from nothing, in this order; what each of them minimizes is in
`vqlib/bundled/losses.py`, and with which settings in `vqlib/bundled/subjects.py`.

## Figures

Classifier: {test_accuracy:.2%} of the real test images. {sampling}
FD (with its 95 % bootstrap interval), IS, precision and recall are in the classifier's {_width(subject)} features (float64 statistics), so
they are not FID and compare only with each other. The first row is real images of the split that the classifier was trained on.

{tables.markdown(table)}

## Nearest training pictures

How far the nearest picture trained on is, with every move and mirror image it was shown in: in the classifier's features, and in
pixels (root mean square, 0 … 255). A generated picture is near where it is nearer than 95 % of the test pictures are.

{tables.markdown(nearest, formats=shares)}

## Data and licence

{subject.licence}
"""
    return write_bytes(Path(target) / "MODEL_CARD.md", text.encode())


def _width(subject: Subject) -> int:
    return KINDS[subject.extractor].dimensions


def _parameters(subject: Subject) -> list[int]:
    """Of every training's network, in the trainings' order."""
    vae, transformer = subject.build_vae(), subject.build_transformer()
    networks = [subject.build_classifier(), vae, decoder_of(vae), *[transformer] * len(subject.rounds)]
    return [sum(p.numel() for p in network.parameters()) for network in networks]
