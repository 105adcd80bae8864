"""The three tasks behind a table's row: a model made, a shard of images sampled, the row evaluated.

A shard leaves the features of its images in a file; the row's statistics are gathered from these in float64, in the
images' order and in the blocks that one process would take, so that they are the same bit for bit whatever the shards.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vqlib.config import CalibrationConfig, SamplingConfig, VQConfig
from vqlib.evaluation.evaluate import CACHE, evaluate_features, of_size
from vqlib.evaluation.extractors import KINDS, Extractor, Features
from vqlib.evaluation.image_sources import BLOCK
from vqlib.evaluation.references import Reference, load_reference, resolve
from vqlib.models import structure
from vqlib.models.class_conditional import DiT
from vqlib.models.geometry import Geometry
from vqlib.models.pipeline import Pipeline
from vqlib.studies.baselines.baseline import Baseline
from vqlib.studies.experiments import (
    Conditions,
    Method,
    class_labels,
    reference_fingerprint,
    sampled_batches,
)
from vqlib.studies.rows import content_key
from vqlib.studies.sources import Source
from vqlib.studies.stage_memory import row_bytes
from vqlib.studies.tasks import Needs, key_of, rows_of
from vqlib.system.files import write_tensors
from vqlib.system.memory import device_label

_built: dict[str, Baseline] = {}  # the transformer that was built here last, by the name of its folder


def release() -> None:
    """Let go of the transformer, reference and extractor that were used here last."""
    _built.clear()
    _judges.cache_clear()


@dataclass(frozen=True)
class Measuring:
    """All that the rows of one study share: the model and its shape, the reference, the kind of device, images of a shard."""

    source: Source
    reference: str
    reference_sha256: str
    extractor: str
    device: str  # as `device_label` has it
    geometry: Geometry | None  # None for other models than DiTs: what a task needs of memory is then not known
    shard: int = BLOCK

    def __post_init__(self) -> None:
        batch = KINDS[self.extractor].batch
        if self.shard < 1 or self.shard % batch:
            raise ValueError(f"shard={self.shard} images: extractor {self.extractor!r} takes multiples of {batch}")

    @classmethod
    def of(cls, pipe: Pipeline, reference: str | Path, **rest) -> Measuring:
        """For a loaded pipeline and a stored reference; `rest`: other fields."""
        source, found = Source.of(pipe), load_reference(reference)
        rest = {"device": device_label(pipe.device)} | rest
        transformer = structure.unwrapped(pipe.transformer)
        geometry = Geometry.of(transformer.config) if isinstance(pipe.denoiser, DiT) else None
        return cls(source, str(reference), reference_fingerprint(reference), found.extractor, geometry=geometry, **rest)

    def pipe(self) -> Pipeline:
        """The model, where this runs."""
        return self.source.open(self.device)

    def judges(self) -> tuple[Reference, Extractor]:
        """Reference and extractor, where this runs. Raises RuntimeError where the reference is another one here."""
        return _judges(self.reference, self.reference_sha256, self.pipe().device)


@lru_cache(1)
def _judges(reference: str, sha256: str, device: torch.device) -> tuple[Reference, Extractor]:
    if reference_fingerprint(reference) != sha256:
        raise RuntimeError(f"reference {reference} is another one here than where the study was begun")
    return resolve(reference, cache=CACHE, device=device)


@dataclass(frozen=True)
class Made:
    """A method's transformer, in a folder of its own."""

    how: Measuring
    method: Method
    cost: float = 1.0

    def __str__(self) -> str:
        return f"model {self.name}"

    @property
    def name(self) -> str:
        return f"{type(self.method).__name__}-{content_key(self.method, *self.how.source.model)}"

    @property
    def needs(self) -> Needs:
        """A core, a GPU where the study's device is one, and memory by the shapes."""
        return self.sampled_by(0)

    def sampled_by(self, batch: int) -> Needs:
        """What is needed where the transformer is made, and then sampled so many images at a time."""
        on_host = self.how.device == "cpu"
        shape, vq = self.how.geometry, getattr(self.method, "vq", VQConfig())
        moments = getattr(_trained(self.method), "moments", None) is not None
        memory = row_bytes(shape, vq, *stages_of(self.method), moments, batch, on_host) if shape else 0
        return Needs(1, 0 if on_host else 1, memory)

    def leaves(self) -> tuple[str, ...]:
        return (f"models/{self.name}",)

    def made_of(self) -> tuple:
        return "made", self.method, *self.how.source.model

    def after(self) -> tuple:
        return ()

    def build(self, folder: Path) -> Baseline:
        """The transformer, made or loaded; the last one is kept for the next task of this process."""
        place = folder / self.leaves()[0]
        if str(place) not in _built:
            _built.clear()
            _built[str(place)] = self.method.build(self.how.pipe(), place)
        return _built[str(place)]

    def run(self, folder: Path, unfinished: Path) -> dict:
        start, made = time.monotonic(), self.build(folder)
        sizes = {"bits_per_weight": made.bits_per_weight, "size_bytes": made.size_bytes}
        return sizes | {"calibration_minutes": made.seconds / 60, "minutes": (time.monotonic() - start) / 60}


def stages_of(method: Method) -> tuple[CalibrationConfig | None, CalibrationConfig | None]:
    """A method's calibration and last stage; None where it has none."""
    return tuple(getattr(_trained(method), name, None) for name in ("calibration", "distillation"))


def _trained(method: Method) -> object:
    return getattr(method, "how", method)  # a rival's training stands in its `Trained`


@dataclass(frozen=True)
class Shard:
    """`count` images of a model from seed `first` on, sampled and seen by the extractor."""

    made: Made
    sampling: SamplingConfig
    first: int
    count: int

    def __str__(self) -> str:
        return f"images {self.first}–{self.first + self.count - 1} of {self.made}"

    @property
    def needs(self) -> Needs:
        return self.made.sampled_by(min(self.sampling.batch_size, self.count))

    @property
    def cost(self) -> float:
        return float(self.count * self.sampling.steps)

    def made_of(self) -> tuple:
        how = self.made.how
        judged = how.source.vae, how.extractor, how.reference_sha256, how.device
        return "shard", self.made.method, *how.source.model, self.sampling, *judged, self.first, self.count

    def after(self) -> tuple:
        return (self.made,)

    def leaves(self) -> tuple[str, ...]:
        return (f"features/{key_of(self)}.safetensors",)

    def run(self, folder: Path, unfinished: Path) -> dict:
        start = time.monotonic()
        self.features(folder, unfinished)
        return {"images": self.count, "minutes": (time.monotonic() - start) / 60}

    def features(self, folder: Path, unfinished: Path) -> Features:
        """Of its images in order; from the file or, where that is missing or damaged, made; `unfinished` then goes."""
        path = folder / self.leaves()[0]
        try:
            return Features(**load_file(path))
        except (FileNotFoundError, SafetensorError, TypeError):
            pass
        pipe, (reference, extractor) = self.made.how.pipe(), self.made.how.judges()
        seeds = range(self.first, self.first + self.count)
        labels = class_labels(len(pipe.class_names), seeds.stop)[self.first :]
        model = self.made.build(folder).model
        images = sampled_batches(pipe.with_transformer(model), labels, seeds, self.sampling, unfinished)
        blocks = list(extractor.stream(of_size(images, reference, ordered=True)))
        found = Features(*(torch.cat(part) for part in _columns(blocks)))
        write_tensors(path, {name: value for name, value in vars(found).items() if value is not None})
        shutil.rmtree(unfinished, ignore_errors=True)
        return found


@dataclass(frozen=True)
class Evaluated:
    """A row: `images` of a model against the reference, from its shards."""

    made: Made
    images: int
    sampling: SamplingConfig
    bootstrap: int = 0
    label: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.label or f"{self.made}, {self.sampling.steps} steps, {self.images} images"

    @property
    def needs(self) -> Needs:
        return self.made.sampled_by(self.sampling.batch_size)

    @property
    def cost(self) -> float:
        return float(self.images * self.sampling.steps)

    def made_of(self) -> tuple:
        how = self.made.how
        shared = {"vae": how.source.vae, "reference": how.reference_sha256, "device": how.device}
        conditions = Conditions(self.images, self.sampling, bootstrap=self.bootstrap, **shared)
        return self.made.method, *how.source.model, conditions

    def after(self) -> tuple[Shard, ...]:
        size = self.made.how.shard
        firsts = range(0, self.images, size)
        return tuple(Shard(self.made, self.sampling, f, min(size, self.images - f)) for f in firsts)

    def leaves(self) -> tuple[str, ...]:
        return ()

    def labels(self) -> Tensor:
        """The class that each image is asked for, int64 [images]."""
        return torch.tensor(class_labels(self.made.how.source.identity["conditions"], self.images))

    def features(self, folder: Path) -> Tensor:
        """Of the row's images in their order, [images, D]: two rows' images have the same seeds, so they pair."""
        kept = ((shard, folder / "unfinished" / key_of(shard)) for shard in self.after())
        return torch.cat([shard.features(folder, unfinished).features for shard, unfinished in kept])

    def run(self, folder: Path, unfinished: Path) -> dict:
        start, rows, shards = time.monotonic(), rows_of(folder), self.after()
        made = rows.read(*self.made.made_of()) or self.made.run(folder, unfinished)
        reference, extractor = self.made.how.judges()
        stream = reblocked(shard.features(folder, unfinished / str(shard.first)) for shard in shards)
        metrics = evaluate_features(
            stream, reference, extractor, self.labels(), count=self.images, bootstrap=self.bootstrap
        )
        sampled = [rows.read(*shard.made_of()) or {"minutes": 0.0} for shard in shards]
        minutes = made["minutes"] + sum(part["minutes"] for part in sampled) + (time.monotonic() - start) / 60
        sizes = {name: made[name] for name in ("bits_per_weight", "size_bytes")}
        return {
            "metrics": metrics.to_dict(),
            "minutes": minutes,
            "calibration_minutes": made["calibration_minutes"],
        } | sizes


def reblocked(parts: Iterable[Features], size: int = BLOCK) -> Iterator[Features]:
    """The same features in blocks of `size` images, the last one smaller; two parts at a time are held."""
    held: list[Features] = []
    for part in parts:
        held.append(part)
        while sum(len(one.features) for one in held) >= size:
            joined = [torch.cat(column) for column in _columns(held)]
            yield Features(*(column[:size] for column in joined))
            held = [Features(*(column[size:] for column in joined))]
    if any(len(one.features) for one in held):
        yield Features(*(torch.cat(column) for column in _columns(held)))


def _columns(parts: list[Features]) -> Iterator[list[Tensor]]:
    """Of several parts the features, the logits and, where there are, the spatial features."""
    for name in ("features", "logits", "spatial"):
        if getattr(parts[0], name) is not None:
            yield [getattr(part, name) for part in parts]
