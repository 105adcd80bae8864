"""One row of a results table: quantize, sample, evaluate, remember. A table that was cut off goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from vqlib.calibrate import calibrate
from vqlib.checkpoint import load_transformer, save
from vqlib.config import CalibrationConfig, SamplingConfig, VQConfig
from vqlib.evaluate import Metrics, evaluate
from vqlib.extractors import Extractor
from vqlib.files import write_bytes
from vqlib.models import Pipeline
from vqlib.quantize import harden, quantize
from vqlib.references import load_reference
from vqlib.sampling import sample


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors; equal for equal models only."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def measure(
    pipe: Pipeline,
    model: nn.Module,
    images: int,
    folder: str | Path,
    sampling: SamplingConfig | None = None,
    reference: str | Path = "fashion-mnist-test",
    extractor: Extractor | None = None,
    first_seed: int = 0,
    progress: bool = False,
) -> Metrics:
    """Metrics of `images` samples of `model`, classes in turn, seeds first_seed … first_seed + images − 1.

    The result is kept in `folder` under a name made of the contents of model, VAE and reference and of all conditions: the
    same row is not computed twice. `extractor` is the reference's own unless one is given.
    """
    sampling, known = sampling or SamplingConfig(), load_reference(reference)
    conditions = sampling.to_dict() | {"images": images, "first_seed": first_seed}
    conditions |= {"reference": known.images_sha256, "extractor": known.fingerprint}
    conditions |= {"model": fingerprint(model), "vae": fingerprint(pipe.vae)}
    name = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(folder) / f"{name}.json"
    if path.exists():
        return Metrics.from_dict(json.loads(path.read_text())["metrics"])
    labels = class_labels(pipe, images)
    seeds = range(first_seed, first_seed + images)
    generated = sample(pipe.with_transformer(model), labels, seeds, sampling, progress=progress)
    metrics = evaluate(generated, known, extractor, labels=labels, cache=None)
    content = {"conditions": conditions, "metrics": metrics.to_dict()}
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())
    return metrics


def packed_model(
    pipe: Pipeline, vq: VQConfig, settings: CalibrationConfig | None, folder: str | Path, seed: int = 0
) -> nn.Module:
    """The packed transformer of one method, made in `folder` or, where it is finished already, loaded from there.

    settings: how it is calibrated; None for k-means alone, each sub-vector with its nearest codeword.
    """
    target = Path(folder) / "packed"
    if target.exists():
        return load_transformer(target)
    if settings is None:
        packed = harden(quantize(pipe.transformer, vq.replace(candidates=1), seed))
    else:
        student = quantize(pipe.transformer, vq, seed)
        packed = calibrate(pipe, student, settings, out=Path(folder) / "calibration").finish()
    about = {"source": pipe.name, "source_sha256": fingerprint(pipe.transformer), "quantization": vq.to_dict()}
    about |= {"seed": seed, "calibration": settings and settings.to_dict()}
    save(packed, target, provenance=about)
    return packed


def class_labels(pipe: Pipeline, images: int) -> Sequence[int]:
    """Every class in turn: image i asks for class i modulo the number of classes."""
    return [i % len(pipe.class_names) for i in range(images)]
