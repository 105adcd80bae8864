"""What a row of a results table is made of: quantize, sample, evaluate. What was cut off goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vqlib.calibrator.calibrate import calibrate
from vqlib.calibrator.distill import distill, require_on_output
from vqlib.calibrator.hessians import input_hessians
from vqlib.calibrator.runs import CHANGE_NO_STEP, differences, read_records
from vqlib.config import OTHER_TRAJECTORIES, CalibrationConfig, SamplingConfig, VQConfig
from vqlib.evaluation.evaluate import CACHE, Metrics, evaluate
from vqlib.evaluation.extractors import Extractor
from vqlib.evaluation.references import load_reference, reference_of, reference_path, resolve
from vqlib.models import structure
from vqlib.models.pipeline import Pipeline
from vqlib.models.sampling import sample_batches
from vqlib.packed.checkpoint import load_transformer, save
from vqlib.packed.harden import harden
from vqlib.quantizer.quantize import fitting_layers, quantize
from vqlib.studies.baselines.baseline import Baseline, Moments, packed
from vqlib.studies.rows import Rows
from vqlib.system.files import write_tensors
from vqlib.system.fingerprint import digest, fingerprint
from vqlib.system.memory import device_label
from vqlib.system.settings import as_seed


@dataclass(frozen=True)
class Conditions:
    """All that the metrics of a model depend on besides it and its `Pipeline.identity`; VAE and reference by SHA-256."""

    images: int
    sampling: SamplingConfig
    vae: str
    reference: str
    device: str
    bootstrap: int = 0  # resamples for FD's interval


class Method(Protocol):
    """A way to few bits: a frozen object, found again by the hash of all its fields."""

    def build(self, pipe: Pipeline, folder: Path) -> Baseline:
        """The transformer; a folder of its own keeps what is not to be made twice."""


@dataclass(frozen=True)
class VectorQuantized:
    """Codes, calibrated or (None) not, distilled or (None) not.

    Error feedback has the `moments` of that calibration's inputs unless others are given.
    """

    vq: VQConfig
    calibration: CalibrationConfig | None
    seed: int = 0
    moments: Moments | None = None
    distillation: CalibrationConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", as_seed("seed", self.seed))
        if self.calibration is None:
            object.__setattr__(self, "vq", self.vq.replace(candidates=1))
        if self.vq.assignment == "error-feedback" and self.moments is None:
            object.__setattr__(self, "moments", Moments(self.calibration or CalibrationConfig(seed=self.seed)))

    def seeded(self, seed: int) -> VectorQuantized:
        """The same with another seed of codebooks, calibration and, on trajectories of its own, distillation."""
        calibration = self.calibration and self.calibration.replace(seed=seed)
        last = self.distillation and self.distillation.replace(seed=seed + OTHER_TRAJECTORIES)
        moments = None if self.moments is None else replace(self.moments, inputs=self.moments.inputs.replace(seed=seed))
        return VectorQuantized(self.vq, calibration, seed, moments, last)

    def build(self, pipe: Pipeline, folder: Path) -> Baseline:
        model = packed_model(
            pipe, self.vq, self.calibration, folder, self.seed, self.moments, distillation=self.distillation
        )
        runs = [folder / part for part in ("calibration", "distillation") if getattr(self, part)]
        return packed(model, sum(record.seconds for run in runs for record in read_records(run)))


def measure(
    pipe: Pipeline,
    model: nn.Module,
    images: int,
    folder: str | Path,
    sampling: SamplingConfig | None = None,
    reference: str | Path | None = None,
    extractor: Extractor | None = None,
    progress: bool = False,
    bootstrap: int = 0,
) -> Metrics:
    """Metrics of `images` samples of `model`, classes in turn, image i with seed i.

    The row in `folder` is found by the contents of model, VAE and reference, by `Pipeline.identity` and all conditions:
    it is not computed twice, and one that was killed goes on from its last batch. `reference`: a stored one, by name or
    path, the bundled model's own unless one is given; `extractor`: its own unless one is given; `progress`: a bar over
    what is still to sample.
    """
    reference = reference_of(pipe.name) if reference is None else reference
    shared = {"vae": fingerprint(pipe.vae), "reference": reference_fingerprint(reference, extractor)}
    how = Conditions(
        images, sampling or SamplingConfig(), **shared, device=device_label(pipe.device), bootstrap=bootstrap
    )
    rows, made_of = Rows(Path(folder)), (fingerprint(model), pipe.identity(), how)
    rows.make(
        lambda kept: _measured(pipe, model, how, reference, kept, extractor, progress).to_dict(), *made_of, wait=True
    )
    return Metrics.from_dict(rows.read(*made_of))


def reference_fingerprint(reference: str | Path, extractor: Extractor | None = None) -> str:
    """SHA-256 of a stored reference's whole file and of the extractor's weights: the given one's, or those the reference says.

    ADM's files say nothing of them: rows against one depend on Inception's weights without knowing them.
    """
    seen_by = extractor.fingerprint if extractor else load_reference(reference).fingerprint
    with reference_path(reference).open("rb") as file:
        return digest([], f"{hashlib.file_digest(file, 'sha256').hexdigest()} {seen_by}")


def _measured(
    pipe: Pipeline,
    model: nn.Module,
    how: Conditions,
    reference: str | Path,
    unfinished: Path,
    extractor: Extractor | None = None,
    progress: bool = False,
) -> Metrics:
    real, extractor = resolve(reference, extractor, cache=CACHE, device=pipe.device)
    labels = class_labels(len(pipe.class_names), how.images)
    generated = sampled_batches(
        pipe.with_transformer(model), labels, range(how.images), how.sampling, unfinished, progress
    )
    return evaluate(generated, real, extractor, labels, count=how.images, bootstrap=how.bootstrap, cache=None)


def sampled_batches(
    pipe: Pipeline,
    labels: Sequence[int],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    folder: Path,
    progress: bool = False,
) -> Iterator[Tensor]:
    """`sample_batches` with every batch kept in `folder`: what is there, without a gap, is not sampled again."""
    done = 0
    while done < len(labels) and (found := _kept_batch(folder, done)) is not None:
        yield found
        done += len(found)
    if done >= len(labels):  # the last batch may hold more than are asked for now
        return
    for batch in sample_batches(pipe, labels[done:], seeds[done:], sampling, progress=progress):
        write_tensors(folder / f"{done:07}.safetensors", {"images": batch})
        done += len(batch)
        yield batch


def packed_model(
    pipe: Pipeline,
    vq: VQConfig,
    settings: CalibrationConfig | None,
    folder: str | Path,
    seed: int = 0,
    moments: Moments | None = None,
    distillation: CalibrationConfig | None = None,
) -> nn.Module:
    """The packed transformer of one method, made in `folder` or, where it is finished already, loaded from there.

    settings: how it is calibrated; None for assignments alone. `moments`: see `VectorQuantized`. `distillation`: of the last
    stage, None for none. A second process waits until the first is done. Raises RuntimeError where the folder's model
    was made from other weights, for another pipeline or with other settings.
    """
    how, target = VectorQuantized(vq, settings, seed, moments, distillation), Path(folder).expanduser() / "packed"
    vq, moments = how.vq, how.moments
    fitting_layers(pipe.transformer, vq)  # before second moments are gathered, and not after it
    require_stages(pipe, settings, distillation)
    about = {"source": pipe.name, "source_sha256": fingerprint(pipe.transformer), "pipeline": pipe.identity()}
    about |= {"quantization": vq.to_dict(), "seed": seed, "calibration": settings and settings.to_dict()}
    about |= {"distillation": distillation and distillation.to_dict()}
    if moments:
        about |= {"inputs": moments.inputs.to_dict(), "hessian_batches": moments.batches}
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / ".building"):
        if target.exists():
            return _loaded(target, about, pipe)
        hessians = input_hessians(pipe, moments.inputs, moments.batches) if moments else None
        student = quantize(pipe.transformer, vq, seed, hessians=hessians)
        del hessians  # as large as the model, and of no use to the training
        out = target.parent / "calibration"
        packed = calibrate(pipe, student, settings, out=out).finish() if settings else harden(student)
        if distillation:
            packed = distill(pipe, packed, distillation, out=target.parent / "distillation").finish()
        save(packed, target, provenance=about)
        del packed  # what is made is what will be found: of a model in half precision a file keeps other types
        return _loaded(target, about, pipe)


def require_stages(
    pipe: Pipeline, calibration: CalibrationConfig | None, distillation: CalibrationConfig | None
) -> None:
    """ValueError for steps that the model's process has not, and for a last stage that is not on the output."""
    for config in (calibration, distillation):
        if config:
            pipe.schedule.respace(config.steps)
    if distillation:
        require_on_output(distillation)


def class_labels(classes: int, images: int) -> Sequence[int]:
    """Every class in turn: image i asks for class i modulo the number of classes."""
    return [i % classes for i in range(images)]


def _loaded(target: Path, about: dict, pipe: Pipeline) -> nn.Module:
    packed = load_transformer(target, pipe.device, type(structure.unwrapped(pipe.transformer)))
    found = packed.hf_quantizer.quantization_config.provenance
    for key, made, wanted in differences({key: found.get(key) for key in about}, json.loads(json.dumps(about))):
        stage, _, field = key.partition(".")
        free = stage in ("calibration", "distillation", "inputs") and f"calibration.{field}" in CHANGE_NO_STEP
        if key != "source" and not free:  # the same weights may go by another name or path
            raise RuntimeError(f"{target} was made with {key}={made}, now {key}={wanted}; give another folder")
    return packed


def _kept_batch(folder: Path, first: int) -> Tensor | None:
    """A kept batch [b, C, H, W]; None where there is none or it is damaged."""
    try:
        return load_file(folder / f"{first:07}.safetensors")["images"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
