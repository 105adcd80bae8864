"""Metrics of generated images: FD, sFID, IS, Precision, Recall and class accuracy, in one pass over the images.

FD, IS, Precision and Recall are torch-fidelity's; the conventions are those of ADM's evaluator (Dhariwal, Nichol 2021).
FD is called FID, and IS plainly IS, only where the extractor is Inception: figures of another one compare only among
themselves.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from vqlib.evaluation.extractors import DATA, Extractor, Features
from vqlib.evaluation.frechet import FeatureStatistics, bootstrap_interval, check_counts, frechet_from_statistics
from vqlib.evaluation.image_sources import count_images, image_blocks
from vqlib.evaluation.references import Reference, gather, resolve
from vqlib.system.settings import as_integer, as_seed

CACHE = DATA / "runs" / "cache"
SPLIT = 5000  # images of one part of the inception score
NEIGHBOR = 3  # k of Precision and Recall
TILE = 16_000_000  # distances held at once: 64 MB


@dataclass(frozen=True)
class Metrics:
    """One row's figures with their conditions; a metric that was not asked for, or cannot be had, is None.

    `fd_low`, `fd_high`: 95 % bootstrap interval of FD at this count. `accuracy`: share classified as asked, 0 … 1.
    """

    fd: float
    sfid: float | None
    inception_score: float
    precision: float | None
    recall: float | None
    accuracy: float | None
    fd_low: float | None
    fd_high: float | None
    images: int
    reference: str
    reference_images: int | None
    extractor: str
    device: str
    minutes: float

    @property
    def fd_name(self) -> str:
        """'FID' for Inception; otherwise 'FD (extractor)'."""
        return "FID" if self.extractor == "inception" else f"FD ({self.extractor})"

    @property
    def is_name(self) -> str:
        return "IS" if self.extractor == "inception" else f"IS ({self.extractor})"

    @property
    def fd_title(self) -> str:
        """The name with the count, on which the figure depends strongly: 'FID-10k', 'FD-5k (fashion)'."""
        return with_count(self.fd_name, self.images)

    def to_dict(self) -> dict:
        """JSON-safe; `from_dict` gives the same metrics back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Metrics:
        unknown = sorted(set(values) ^ {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"these are not metrics: {', '.join(unknown)} is missing or unknown")
        return cls(**values)

    def to_row(self, **conditions) -> dict:
        """A table's row: `conditions` (method, bits, steps, seeds …) first, then the metrics by their right names."""
        row = {**conditions, self.fd_name: self.fd}
        if self.fd_low is not None:
            row |= {f"{self.fd_name} low": self.fd_low, f"{self.fd_name} high": self.fd_high}
        if self.sfid is not None:
            row["sFID"] = self.sfid
        row |= {self.is_name: self.inception_score, "precision": self.precision, "recall": self.recall}
        rest = ("accuracy", "images", "reference", "extractor", "device", "minutes")
        return row | {name: getattr(self, name) for name in rest}


def with_count(distance: str, images: int) -> str:
    """A distance's name with the number of images: 'FD (fashion)' of 5000 -> 'FD-5k (fashion)'."""
    count = f"{images // 1000}k" if images % 1000 == 0 else str(images)
    head, space, extractor = distance.partition(" ")
    return f"{head}-{count}{space}{extractor}"


def evaluate(
    images,
    reference="fashion-mnist-test",
    extractor: str | Extractor | None = None,
    labels: Sequence[int] | Tensor | None = None,
    *,
    count: int | None = None,
    precision_recall: bool = True,
    bootstrap: int = 0,
    seed: int = 0,
    allow_few: bool = False,
    cache: str | Path | None = CACHE,
    progress: bool = False,
    device: torch.device | str | None = None,
) -> Metrics:
    """Compare uint8 images with a reference, in one pass.

    `images`: uint8 tensor [N, C, H, W], NumPy array [N, H, W, C], Dataset, iterator of batches, folder, or `.npz`.
    `reference`: a name, a stored file, ADM's `.npz`, a folder or other images (name the extractor), or a Reference.
    `labels`: the N classes asked for. `count`: how many images there must be. `bootstrap`: resamples for FD's interval,
    drawn with `seed`, within the classes where labels are given. `cache`: folder of features by the images' content, None
    for none. `device`: where an extractor that is loaded here runs, by default where a tensor of images is, else the CPU.
    Memory does not grow with N, but for the logits and, where Precision, Recall or the bootstrap need them, D numbers
    in half precision an image; the bootstrap makes three copies of these in double precision. Accuracy is judged by the
    extractors that know the classes: the bundled classifiers.
    Raises ValueError for too few images, floats, NaN, a wrong size, or counts that disagree.
    """
    start = time.monotonic()
    labels = None if labels is None else _as_labels(labels)
    seed, bootstrap = as_seed("seed", seed), as_integer("bootstrap", bootstrap)
    if bootstrap < 0 or bootstrap == 1:
        raise ValueError(f"bootstrap={bootstrap} resamples: needs at least 2, or 0 for no interval")
    total = _agreed_count(count_images(images), count, None if labels is None else len(labels))
    device = device or (images.device if isinstance(images, Tensor) else "cpu")
    reference, extractor = resolve(reference, extractor, precision_recall, cache, progress, device)
    dimensions = extractor.kind.dimensions
    _require_known(labels, extractor)
    if total:  # of none it is told below where they were looked for
        check_counts(total, reference.count, dimensions, allow_few)
    stream = extractor.stream(of_size(images, reference, labels is not None), cache, progress, total)
    options = {"precision_recall": precision_recall, "bootstrap": bootstrap, "seed": seed, "allow_few": allow_few}
    return evaluate_features(stream, reference, extractor, labels, count=count, start=start, **options)


def evaluate_features(
    stream: Iterable[Features],
    reference: Reference,
    extractor: Extractor,
    labels: Tensor | None = None,
    *,
    count: int | None = None,
    precision_recall: bool = True,
    bootstrap: int = 0,
    seed: int = 0,
    allow_few: bool = False,
    start: float | None = None,
) -> Metrics:
    """As `evaluate`, of blocks of features that this extractor gave, wherever they were made; `start`: of its minutes."""
    start = time.monotonic() if start is None else start
    keep = (precision_recall and reference.features is not None) or bootstrap > 0
    found = gather(stream, keep, logits=True)
    n = _agreed_count(found.pool.count, count, None if labels is None else len(labels))
    check_counts(n, reference.count, extractor.kind.dimensions, allow_few)
    fd = frechet_from_statistics(found.pool.mean, found.pool.covariance, reference.mean, reference.covariance)
    low, high = None, None
    if bootstrap:
        real = reference.mean, reference.covariance
        low, high = bootstrap_interval(found.features, *real, fd, bootstrap, seed, labels)
    precision, recall = None, None
    if precision_recall and reference.features is not None:
        where = next(extractor.module.parameters()).device  # all pairs of images: a GPU's work where there is one
        precision, recall = _precision_recall(found.features.to(where), reference.features.to(where))
    return Metrics(
        fd=fd,
        sfid=_sfid(found.spatial, reference, allow_few),
        inception_score=inception_score(found.logits),
        precision=precision,
        recall=recall,
        accuracy=_accuracy(found.logits, labels, extractor),
        fd_low=low,
        fd_high=high,
        images=n,
        reference=reference.name,
        reference_images=reference.count,
        extractor=extractor.name,
        device=str(next(extractor.module.parameters()).device),
        minutes=(time.monotonic() - start) / 60,
    )


def inception_score(logits: Tensor) -> float:
    """exp E KL(p(y|x) ‖ p(y)) of logits [N, C]: the mean over consecutive parts of 5000 and what is left, as ADM."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    parts = [isc_features_to_metric(part, splits=1, shuffle=False) for part in logits.split(SPLIT)]
    return float(sum(part[KEY_METRIC_ISC_MEAN] for part in parts) / len(parts))


def precision_recall(features: Tensor, reference_features: Tensor) -> tuple[float, float]:
    """Improved Precision and Recall (Kynkäänniemi et al. 2019), k = 3: generated [N, D] against real [M, D]."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    fewest = min(len(features), len(reference_features))
    if fewest <= NEIGHBOR:
        raise ValueError(
            f"precision and recall need more than {NEIGHBOR} images on each side, got "
            f"{len(features)} against {len(reference_features)}"
        )
    rows = max(1, TILE // max(len(features), len(reference_features)))
    values = prc_features_to_metric(
        features.float(),
        reference_features.float(),
        prc_neighborhood=NEIGHBOR,
        prc_batch_size=rows,
        save_cpu_ram=True,
        verbose=False,
    )
    return values[KEY_METRIC_PRECISION], values[KEY_METRIC_RECALL]


_precision_recall = precision_recall  # `evaluate` has a switch of that name


def of_size(images, reference: Reference, ordered: bool) -> Iterator[Tensor]:
    """Blocks of images; ValueError where they are not as large as the reference's."""
    for block in image_blocks(images, ordered=ordered):
        size = tuple(block.shape[2:])
        if reference.size is not None and size != reference.size:
            raise ValueError(
                f"images are {size[0]}×{size[1]} px, those of reference {reference.name!r} are "
                f"{reference.size[0]}×{reference.size[1]}"
            )
        yield block


def _agreed_count(images: int | None, count: int | None, labels: int | None) -> int | None:
    known = {"images": images, "count": count, "labels": labels}
    known = {name: value for name, value in known.items() if value is not None}
    if len(set(known.values())) > 1:
        raise ValueError("counts disagree: " + ", ".join(f"{value} {name}" for name, value in known.items()))
    return next(iter(known.values()), None)


def _sfid(spatial: FeatureStatistics, reference: Reference, allow_few: bool) -> float | None:
    if not spatial.count or reference.spatial_mean is None:
        return None
    check_counts(spatial.count, reference.count, len(reference.spatial_mean), allow_few)
    real = reference.spatial_mean, reference.spatial_covariance
    return frechet_from_statistics(spatial.mean, spatial.covariance, *real)


def _as_labels(labels) -> Tensor:
    """Class labels as int64 [N]. Raises ValueError on another shape (one-hot, [N, 1]) or what is no number of a class."""
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"labels of type {type(labels).__name__} are no class numbers ({error})") from None
    if found.ndim != 1:
        raise ValueError(f"labels have shape {list(found.shape)}, expected [N]: one class number an image")
    flags = isinstance(labels, (list, tuple)) and any(isinstance(label, bool) for label in labels)
    if len(found) and (flags or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool):
        kind = torch.bool if flags else found.dtype
        raise ValueError(f"labels are {kind}, expected integers: one class number an image")
    found = found.long().cpu()
    if len(found) and int(found.min()) < 0:
        raise ValueError(f"labels run from {int(found.min())} to {int(found.max())}; classes are numbered from 0")
    return found


def _require_known(labels: Tensor | None, extractor: Extractor) -> None:
    """Labels an extractor that knows classes has never heard of are refused before images are read."""
    classes = extractor.kind.classes
    if labels is None or classes is None or not len(labels):
        return
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}; extractor {extractor.name!r} "
            f"knows the classes 0 … {classes - 1}"
        )


def _accuracy(logits: Tensor, labels: Tensor | None, extractor: Extractor) -> float | None:
    if labels is None or extractor.kind.classes is None:
        return None
    return float((logits.argmax(dim=1) == labels).double().mean())
