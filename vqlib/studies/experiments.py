"""One row of a results table: quantize, sample, evaluate, remember. What was cut off goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vqlib.calibrator.calibrate import calibrate
from vqlib.calibrator.hessians import BATCHES, input_hessians
from vqlib.config import CalibrationConfig, SamplingConfig, VQConfig
from vqlib.evaluation.evaluate import CACHE, Metrics, evaluate
from vqlib.evaluation.extractors import Extractor, Progress, print_progress
from vqlib.evaluation.references import Reference, load_reference, resolve
from vqlib.models.pipeline import Pipeline
from vqlib.models.sampling import sample_batches
from vqlib.packed.checkpoint import load_transformer, save
from vqlib.packed.harden import harden
from vqlib.quantizer.quantize import fitting_layers, quantize
from vqlib.system.files import write_bytes, write_tensors
from vqlib.system.fingerprint import digest, fingerprint
from vqlib.system.memory import device_label


def reference_fingerprint(reference: Reference) -> str:
    """SHA-256 of the statistics and of the extractor they were made with."""
    parts = [("mean", reference.mean), ("covariance", reference.covariance)]
    return digest(parts, f"{reference.extractor} {reference.fingerprint}")


def measure(
    pipe: Pipeline,
    model: nn.Module,
    images: int,
    folder: str | Path,
    sampling: SamplingConfig | None = None,
    reference: str | Path = "fashion-mnist-test",
    extractor: Extractor | None = None,
    first_seed: int = 0,
    progress: bool | Progress = False,
    bootstrap: int = 0,
) -> Metrics:
    """Metrics of `images` samples of `model`, classes in turn, seeds first_seed … first_seed + images − 1.

    The result is kept in `folder` under a name made of the contents of model, VAE and reference and of all conditions:
    the same row is not computed twice. Sampled batches stay in `folder`/samples until the row is done, so a row that
    was killed goes on from its last batch. `reference`: a stored one, by name or path; `extractor`: its own unless one is
    given; `progress` is told the images still to sample; `bootstrap`: resamples for FD's interval.
    """
    sampling = sampling or SamplingConfig()
    conditions = sampling.to_dict() | {"images": images, "first_seed": first_seed, "bootstrap": bootstrap}
    conditions |= {"reference": reference_fingerprint(load_reference(reference))}
    conditions |= {"model": fingerprint(model), "vae": fingerprint(pipe.vae), "device": device_label(pipe.device)}
    name = content_key(conditions)
    path, samples = Path(folder) / f"{name}.json", Path(folder) / "samples" / name
    if path.exists():
        return Metrics.from_dict(json.loads(path.read_text())["metrics"])
    real, extractor = resolve(reference, extractor, cache=CACHE, device=pipe.device)
    labels, seeds = class_labels(pipe, images), range(first_seed, first_seed + images)
    report = print_progress if progress is True else progress or None
    generated = sampled_batches(pipe.with_transformer(model), labels, seeds, sampling, samples, report)
    metrics = evaluate(generated, real, extractor, labels, count=images, bootstrap=bootstrap, cache=None)
    content = {"conditions": conditions, "metrics": metrics.to_dict()}
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())
    shutil.rmtree(samples, ignore_errors=True)
    return metrics


def sampled_batches(
    pipe: Pipeline,
    labels: Sequence[int],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    folder: Path,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """`sample_batches` with every batch kept in `folder`: what is there, without a gap, is not sampled again."""
    done = 0
    while done < len(labels) and (found := _read_batch(folder / _batch_name(done))) is not None:
        yield found
        done += len(found)
    first, start = done, time.monotonic()
    if done == len(labels):
        return
    for batch in sample_batches(pipe, labels[done:], seeds[done:], sampling):
        write_tensors(folder / _batch_name(done), {"images": batch})
        done += len(batch)
        if progress is not None:
            progress(done - first, len(labels) - first, time.monotonic() - start)
        yield batch


def packed_model(
    pipe: Pipeline,
    vq: VQConfig,
    settings: CalibrationConfig | None,
    folder: str | Path,
    seed: int = 0,
    inputs: CalibrationConfig | None = None,
    hessian_batches: int = BATCHES,
) -> nn.Module:
    """The packed transformer of one method, made in `folder` or, where it is finished already, loaded from there.

    settings: how it is calibrated; None for assignments alone. Where `vq` asks for error feedback it uses the second moments
    of `hessian_batches` calibration steps of `inputs`, by default of `settings`. A second process waits until the first is done.
    Raises RuntimeError where the folder's model was made from other weights or with other settings.
    """
    target, vq = Path(folder).expanduser() / "packed", vq if settings else vq.replace(candidates=1)
    fitting_layers(pipe.transformer, vq)  # before second moments are gathered, and not after it
    about = {"source": pipe.name, "source_sha256": fingerprint(pipe.transformer), "quantization": vq.to_dict()}
    about |= {"seed": seed, "calibration": settings and settings.to_dict()}
    feedback, inputs = vq.assignment == "error-feedback", inputs or settings or CalibrationConfig(seed=seed)
    about |= {"inputs": inputs.to_dict(), "hessian_batches": hessian_batches} if feedback else {}
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / ".building"):
        if target.exists():
            return _loaded(target, about).to(pipe.device)
        student = quantize(
            pipe.transformer, vq, seed, hessians=input_hessians(pipe, inputs, hessian_batches) if feedback else None
        )
        if settings is None:
            packed = harden(student)
        else:
            packed = calibrate(pipe, student, settings, out=target.parent / "calibration").finish()
        save(packed, target, provenance=about)
        return packed


def class_labels(pipe: Pipeline, images: int) -> Sequence[int]:
    """Every class in turn: image i asks for class i modulo the number of classes."""
    return [i % len(pipe.class_names) for i in range(images)]


def content_key(conditions: dict) -> str:
    """A file name of 16 hexadecimal digits for JSON-safe conditions, the same whatever their order."""
    return hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]


def _loaded(target: Path, about: dict) -> nn.Module:
    packed = load_transformer(target)
    found = packed.hf_quantizer.quantization_config.provenance
    for key, wanted in json.loads(json.dumps(about)).items():
        if key != "source" and found.get(key) != wanted:  # the same weights may go by another name or path
            made = found.get(key)
            raise RuntimeError(f"{target} was made with {key}={made}, now {key}={wanted}; give another folder")
    return packed


def _batch_name(first: int) -> str:
    return f"{first:07}.safetensors"


def _read_batch(path: Path) -> Tensor | None:
    """A kept batch [b, C, H, W]; None where there is none or it is damaged."""
    try:
        return load_file(path)["images"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
