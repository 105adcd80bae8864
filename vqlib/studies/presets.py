"""Named settings for whole jobs, each with the model, the figure it must give or that is quoted, and the sizes.

dit-xl-2-256-w2, -w3, -w4      facebook/DiT-XL-2-256 or DiT-XL-2-256x256.pt
dit-xl-2-512-w2, -w3, -w4      facebook/DiT-XL-2-512 or DiT-XL-2-512x512.pt
dit-mini-fashion-w2, -w3, -w4  the first bundled model
sit-mini-emoji-w2, -w3, -w4    the second one
sit-xl-2-256-w2, -w3, -w4      the original SiT-XL-2-256x256.pt, with family="sit"
pixart-sigma-xl-1024-w2, sd3.5-medium-w2, flux.1-dev-w2, each with -w3, -w4; they take prompts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from vqlib.config import RECIPES, CalibrationConfig, SamplingConfig, VQConfig
from vqlib.evaluation.references import OF_MODEL
from vqlib.models.blueprint import FLUX_DEV, PIXART_SIGMA_XL, SD35_MEDIUM, Blueprint
from vqlib.models.geometry import Geometry, Sizes
from vqlib.models.pipeline import BUNDLED, BUNDLED_FLOW, DATA
from vqlib.system.settings import as_integer


@dataclass(frozen=True)
class Preset:
    """One job: which model, how it is quantized, calibrated and sampled, and what is known of the outcome."""

    name: str
    model: str  # what `vqlib.load` takes; a local folder or `.pt` file of the same geometry serves as well
    geometry: Geometry | Blueprint
    vq: VQConfig
    calibration: CalibrationConfig
    sampling: SamplingConfig
    images: int  # of one table row
    reference: str | None  # of evaluation; None: the user's own file, for ImageNet ADM's .npz
    family: str = "dit"  # of an original `.pt` file
    distillation: CalibrationConfig | None = None  # of a last stage on the model's output

    def __post_init__(self) -> None:
        if as_integer("images", self.images) < 0:
            raise ValueError(f"images={self.images} must be 0 or more")

    def distilled(self, iterations: int) -> Preset:
        """With recipe `best`'s last stage of so many iterations, along the trajectory of calibration; 0: without."""
        last = RECIPES["best"].last(self.calibration, iterations=iterations) if iterations else None
        return replace(self, distillation=last)

    @property
    def sizes(self) -> Sizes:
        """Expected sizes of the blocks by the paper's counting."""
        return self.geometry.sizes(self.vq)

    @property
    def expected(self) -> str:
        """What the README's tables have for these codes and this calibration of dit-mini-fashion; empty where none is known, as after a last stage."""
        if self.geometry != BUNDLED_GEOMETRY or self.sampling != SamplingConfig() or self.distillation:
            return ""
        found = (r.expected for r in RECIPES.values() if (r.vq, r.calibration) == (self.vq, self.calibration))
        return next(found, "")

    @property
    def quoted(self) -> dict[str, Any] | None:
        """The row of data/paper/fid.csv for this model, resolution and bits; None, or NaN in a cell, where it is not known."""
        if not self.name.startswith("dit-xl-2"):
            return None
        table = pd.read_csv(DATA / "paper" / "fid.csv")
        resolution = 8 * self.geometry.sample_size
        same = (table["method"] == "VQ4DiT") & (table["bits"] == self.vq.bits) & (table["resolution"] == resolution)
        rows = table[same]
        return None if rows.empty else rows.iloc[0].to_dict()

    def with_settings(self, settings: Mapping[str, Any]) -> Preset:
        """With changes such as {"vq.candidates": 2, "images": 500}; ValueError for settings that do not exist."""
        changes: dict[str, Any] = {"vq": {}, "calibration": {}, "sampling": {}}
        changes |= {"distillation": {}} if self.distillation else {}
        own: dict[str, Any] = {}
        for key, value in settings.items():
            part, _, name = key.rpartition(".")
            if part not in changes and key not in ("model", "images", "reference"):
                known = "".join(f"{part}.…, " for part in changes)
                raise ValueError(f"{key!r} is not {known}model, images or reference")
            (changes[part] if part else own)[name] = value
        for part, values in changes.items():
            settled = getattr(self, part).to_dict()
            if part == "vq" and values.keys() & {"bits", "k", "d"}:  # they follow from each other
                settled |= {"bits": None, "k": None, "d": None}
            own[part] = type(getattr(self, part)).from_dict(settled | values)
        return replace(self, **own)


def preset(name: str) -> Preset:
    """The preset of that name; raises ValueError naming the known ones."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]


BUNDLED_GEOMETRY = Geometry(hidden=192, heads=3, depth=6, sample_size=8, classes=10)
FLOW_GEOMETRY = replace(BUNDLED_GEOMETRY, in_channels=8, out_channels=8, classes=12)


def _paper(resolution: int, bits: int) -> Preset:
    """DiT-XL/2 with the paper's settings."""
    job = _bundled(bits)
    return replace(
        job,
        name=f"dit-xl-2-{resolution}-w{bits}",
        model=f"facebook/DiT-XL-2-{resolution}",
        geometry=Geometry(sample_size=resolution // 8),
        calibration=job.calibration.replace(checkpoint_every=50),
        sampling=job.sampling.replace(batch_size=32),
        images=10_000,
        reference=None,
    )


def _bundled(bits: int, model: str = BUNDLED, geometry: Geometry = BUNDLED_GEOMETRY) -> Preset:
    """A bundled model with the paper's settings; `expected` of the first at 2 bits: FD-5k (fashion) 1.29, full precision 0.41."""
    vq, name = VQConfig(bits=bits, candidates=3), f"{model}-w{bits}"
    job = model, geometry, vq, CalibrationConfig(), SamplingConfig(steps=50, guidance_scale=1.5)
    return Preset(name, *job, images=1000, reference=OF_MODEL[model])


def _sit(bits: int) -> Preset:
    """SiT-XL/2: DiT-XL/2's shape, trained by flow matching."""
    return replace(_paper(256, bits), name=f"sit-xl-2-256-w{bits}", model="SiT-XL-2-256x256.pt", family="sit")


def _text_to_image(name: str, model: str, geometry: Blueprint, steps: int, scale: float, bits: int) -> Preset:
    """The paper's codes and calibration along trajectories of the model's own steps and guidance; images of 1024 × 1024."""
    job = _paper(512, bits)
    return replace(
        job,
        name=f"{name}-w{bits}",
        model=model,
        geometry=geometry,
        calibration=job.calibration.replace(batch_size=4, steps=steps, guidance_scale=scale),
        sampling=job.sampling.replace(batch_size=4, steps=steps, guidance_scale=scale),
        images=1000,
    )


TEXT_TO_IMAGE = (
    ("pixart-sigma-xl-1024", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", PIXART_SIGMA_XL, 20, 4.5),
    ("sd3.5-medium", "stabilityai/stable-diffusion-3.5-medium", SD35_MEDIUM, 40, 4.5),
    ("flux.1-dev", "black-forest-labs/FLUX.1-dev", FLUX_DEV, 28, 3.5),
)
BITS = (2, 3, 4)
JOBS = [_paper(resolution, bits) for resolution in (256, 512) for bits in BITS]
JOBS += [
    *map(_bundled, BITS),
    *(_bundled(bits, BUNDLED_FLOW, FLOW_GEOMETRY) for bits in BITS),
    *map(_sit, BITS),
    *(_text_to_image(*job, bits) for job in TEXT_TO_IMAGE for bits in BITS),
]
PRESETS = {job.name: job for job in JOBS}
