"""What generated images are compared with: the statistics and features of real ones, stored, or made on the spot.

A stored reference is one safetensors file: mean and covariance in float64 (FD, exact), up to 10,000 features in float16
(Precision, Recall), and a JSON text that says which extractor made them from which images. ADM's `.npz` is read too.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqlib.evaluation.extractors import KINDS, Extractor, Features, load_extractor
from vqlib.evaluation.frechet import FeatureStatistics, check_counts
from vqlib.evaluation.image_sources import count_images, image_blocks
from vqlib.models.pipeline import BUNDLED, BUNDLED_FLOW, DATA
from vqlib.system.files import write_tensors
from vqlib.system.settings import as_integer, as_seed

OF_MODEL = {BUNDLED: "fashion-mnist-test", BUNDLED_FLOW: "emoji-test"}  # the stored reference of each bundled model
STORED = {name: DATA / model / f"reference-{name}.safetensors" for model, name in OF_MODEL.items()}
MANIFOLD_IMAGES = 10_000  # reference images of Precision and Recall, as ADM's evaluator
ABOUT = "reference"  # the key of the JSON text in the file's metadata
TENSORS = ("mean", "covariance", "spatial_mean", "spatial_covariance", "features")
STORED_AS = {name: name for name in ("name", "extractor", "count", "size", "images_sha256")}  # key of the text -> field
STORED_AS["extractor_sha256"] = "fingerprint"


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of real images: mean [D], covariance [D, D] (float64), features [M, D] or None; the same for sFID.

    `count` and `size` (pixels, H and W) are None where a file does not tell; `fingerprint` is the extractor's.
    Raises ValueError for an unknown extractor, statistics of another dimension than its, NaN and infinity.
    """

    name: str
    extractor: str
    mean: Tensor
    covariance: Tensor
    features: Tensor | None = None
    spatial_mean: Tensor | None = None
    spatial_covariance: Tensor | None = None
    count: int | None = None
    size: tuple[int, int] | None = None
    fingerprint: str | None = None
    images_sha256: str | None = None

    def __post_init__(self) -> None:
        if self.extractor not in KINDS:
            raise ValueError(f"reference {self.name!r}: extractor {self.extractor!r} is not one of {', '.join(KINDS)}")
        d, s = KINDS[self.extractor].dimensions, 0 if self.spatial_mean is None else len(self.spatial_mean)
        shapes = {"mean": [d], "covariance": [d, d], "features": [d], "spatial_mean": [s], "spatial_covariance": [s, s]}
        for field, shape in shapes.items():
            value = getattr(self, field)
            if value is None and (field == "features" or (s == 0 and field.startswith("spatial"))):
                continue
            found = None if value is None else list(value.shape[field == "features" :])
            if found != shape:
                raise ValueError(
                    f"reference {self.name!r}: {field} has shape {found}, extractor {self.extractor!r} needs {shape}"
                )
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"reference {self.name!r}: {field} contains NaN or infinity")

    def check(self, extractor: Extractor) -> None:
        """Raise ValueError unless these statistics were made by this extractor with these weights."""
        if extractor.name != self.extractor:
            raise ValueError(
                f"reference {self.name!r} was made with extractor {self.extractor!r}, not {extractor.name!r}"
            )
        if self.fingerprint is not None and extractor.fingerprint != self.fingerprint:
            raise ValueError(
                f"reference {self.name!r} was made with other weights of {self.extractor!r}: "
                f"SHA-256 {self.fingerprint[:12]}…, these are {extractor.fingerprint[:12]}…"
            )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; features as float16."""
        tensors = {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}
        if self.features is not None:
            tensors["features"] = self.features.half()
        about = {"format": 1} | {stored: getattr(self, field) for stored, field in STORED_AS.items()}
        write_tensors(path, tensors, {ABOUT: json.dumps(about)})
        return Path(path)


@dataclass(frozen=True, eq=False)
class Gathered:
    """What one pass leaves: statistics, features [N, D] in float16 and logits [N, C] where they were kept."""

    pool: FeatureStatistics
    spatial: FeatureStatistics
    features: Tensor | None
    logits: Tensor | None


def gather(stream: Iterator[Features], features: bool = False, logits: bool = False) -> Gathered:
    """One pass over blocks of features; `features`, `logits`: what is kept image by image."""
    pool, spatial, kept, judged = FeatureStatistics(), FeatureStatistics(), [], []
    for block in stream:
        pool.update(block.features)
        if block.spatial is not None:
            spatial.update(block.spatial)
        if features:
            kept.append(block.features.half())
        if logits:
            judged.append(block.logits)
    return Gathered(pool, spatial, torch.cat(kept) if features else None, torch.cat(judged) if logits else None)


def make_reference(
    images,
    extractor: str | Extractor,
    path: str | Path | None = None,
    name: str | None = None,
    keep: int = MANIFOLD_IMAGES,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Reference:
    """Statistics of `images` (see `image_blocks`), written to `path` where one is given.

    Of more than `keep` images a random subset, drawn with `seed`, keeps its features; 0 keeps none.
    """
    seed, keep = as_seed("seed", seed), as_integer("keep", keep)
    if keep < 0:
        raise ValueError(f"keep={keep} features: needs 0 or more")
    extractor = load_extractor(extractor)
    digest, shape = hashlib.sha256(), []

    def hashed() -> Iterator[Tensor]:
        for block in image_blocks(images):
            shape[:] = block.shape[2:]
            digest.update(block.cpu().contiguous().numpy().tobytes())
            yield block

    found = gather(extractor.stream(hashed(), cache, progress, count_images(images)), keep > 0)
    reference = Reference(
        name=name or (Path(path).stem if path else str(images) if isinstance(images, (str, Path)) else "images"),
        extractor=extractor.name,
        mean=found.pool.mean,
        covariance=found.pool.covariance,
        features=_subset(found.features, keep, seed).float() if keep else None,
        spatial_mean=found.spatial.mean,
        spatial_covariance=found.spatial.covariance if found.spatial.count else None,
        count=found.pool.count,
        size=tuple(shape),
        fingerprint=extractor.fingerprint,
        images_sha256=digest.hexdigest(),
    )
    if path is not None:
        reference.save(path)
    return reference


def reference_of(model: str) -> str:
    """The stored reference of a bundled model, by the model's name or the folder's. ValueError where a model has none."""
    if (name := Path(model).name) not in OF_MODEL:
        raise ValueError(
            f"model {model!r} has no reference of its own: give reference=, one of {', '.join(STORED)}, or a file"
        )
    return OF_MODEL[name]


def reference_path(reference: str | Path) -> Path:
    """The file of a stored reference, by its name or path. FileNotFoundError where there is none."""
    path = Path(STORED.get(str(reference), reference)).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no reference at {path}; known names: {', '.join(STORED)}")
    return path


def require_enough(path: str | Path, images: int) -> None:
    """ValueError where so many images, or the stored reference's own, are too few for its features; see `check_counts`."""
    reference = load_reference(path)
    check_counts(images, reference.count, len(reference.mean))


def load_reference(path: str | Path) -> Reference:
    """Read a stored reference by name or path: this module's safetensors, or ADM's `.npz` (statistics only).

    Raises FileNotFoundError, and ValueError for a damaged or foreign file.
    """
    path = reference_path(path)
    return _load_adm(path) if path.suffix == ".npz" else _load_stored(path)


def resolve(
    reference,
    extractor: str | Extractor | None = None,
    manifold: bool = True,
    cache: str | Path | None = None,
    progress: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[Reference, Extractor]:
    """Whatever names a reference (name, file, folder, Dataset, tensor, Reference), and its extractor, ready to compare.

    Without `extractor` the reference's own is loaded; real images do not know one, so there it must be named. With
    `manifold`, features for Precision and Recall are taken from the images in ADM's file.
    """
    stored = _is_stored(reference)
    if stored and not isinstance(reference, Reference):
        path, reference = reference_path(reference), load_reference(reference)
    else:
        path = None
    if extractor is None and not isinstance(reference, Reference):
        raise ValueError(f"a reference made of images needs extractor=…, one of {', '.join(KINDS)}")
    extractor = load_extractor(reference.extractor if extractor is None else extractor, device=device)
    if not stored:
        return make_reference(reference, extractor, cache=cache, progress=progress), extractor
    reference.check(extractor)
    if manifold and reference.features is None and path is not None and path.suffix == ".npz" and reference.size:
        images = make_reference(path, extractor, cache=cache, progress=progress)
        reference = Reference(**{**vars(reference), "features": images.features})
    return reference, extractor


def _is_stored(reference) -> bool:
    if isinstance(reference, (str, Path)):
        path = Path(reference).expanduser()
        return str(reference) in STORED or (not path.is_dir() and not _npz_is_images(path))
    return isinstance(reference, Reference)


def _npz_members(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a readable .npz file: {error}") from None


def _npz_is_images(path: Path) -> bool:
    """Whether an `.npz` holds images and no statistics, as ADM's sample files do."""
    return path.suffix == ".npz" and path.is_file() and "mu" not in _npz_members(path)


def _load_adm(path: Path) -> Reference:
    members = _npz_members(path)
    if not {"mu", "sigma"} <= members:
        raise ValueError(f"{path} holds {', '.join(sorted(members))}; a reference needs mu and sigma")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = [key for key in ("mu", "sigma", "mu_s", "sigma_s") if key in members]
            values = {key: torch.from_numpy(file[key].astype(np.float64)) for key in found}
        size = tuple(next(image_blocks(path, 1)).shape[2:]) if "arr_0" in members else None
        spatial = {"spatial_mean": values.get("mu_s"), "spatial_covariance": values.get("sigma_s")}
        return Reference(path.stem, "inception", values["mu"], values["sigma"], size=size, **spatial)
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as a reference ({error})") from None


def _load_stored(path: Path) -> Reference:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[ABOUT])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        values = {field: about[stored] for stored, field in STORED_AS.items()}
        values["size"] = tuple(values["size"]) if values["size"] else None
        if "features" in tensors:
            tensors["features"] = tensors["features"].float()
        return Reference(**values, **tensors)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a readable reference: {error}") from None


def _subset(features: Tensor, keep: int, seed: int) -> Tensor:
    """Rows of `features`, all or `keep` of them drawn without replacement, in order."""
    if len(features) <= keep:
        return features
    drawn = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:keep]
    return features[drawn.sort().values]
