"""Named settings for whole jobs, each with the model, the figure quoted for it and the sizes it must give.

dit-xl-2-256-w2, -w3, -w4      facebook/DiT-XL-2-256 or DiT-XL-2-256x256.pt
dit-xl-2-512-w2, -w3, -w4      facebook/DiT-XL-2-512 or DiT-XL-2-512x512.pt
dit-mini-fashion-w2, -w3, -w4  the bundled model
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from vqlib.config import CalibrationConfig, SamplingConfig, VQConfig, as_integer
from vqlib.models.geometry import Geometry, Sizes
from vqlib.models.pipeline import BUNDLED, DATA


@dataclass(frozen=True)
class Preset:
    """One job: which model, how it is quantized, calibrated and sampled, and what is known of the outcome."""

    name: str
    model: str  # what `vqlib.load` takes; a local folder or `.pt` file of the same geometry serves as well
    geometry: Geometry
    vq: VQConfig
    calibration: CalibrationConfig
    sampling: SamplingConfig
    images: int  # of one table row
    reference: str | None  # of evaluation; None: the user's own file, for ImageNet ADM's .npz

    def __post_init__(self) -> None:
        if as_integer("images", self.images) < 0:
            raise ValueError(f"images={self.images} must be 0 or more")

    @property
    def sizes(self) -> Sizes:
        """Expected sizes of the blocks by the paper's counting."""
        return self.geometry.sizes(self.vq)

    @property
    def quoted(self) -> dict[str, Any] | None:
        """The row of data/paper/fid.csv for this model, resolution and bits; None, or NaN in a cell, where it is not known."""
        table = pd.read_csv(DATA / "paper" / "fid.csv")
        resolution = 8 * self.geometry.sample_size
        same = (table["method"] == "VQ4DiT") & (table["bits"] == self.vq.bits) & (table["resolution"] == resolution)
        rows = table[same & (self.name.startswith("dit-xl-2"))]
        return None if rows.empty else rows.iloc[0].to_dict()

    def with_settings(self, settings: Mapping[str, Any]) -> Preset:
        """With changes such as {"vq.candidates": 2, "images": 500}; ValueError for settings that do not exist."""
        changes: dict[str, Any] = {"vq": {}, "calibration": {}, "sampling": {}}
        own: dict[str, Any] = {}
        for key, value in settings.items():
            part, _, name = key.rpartition(".")
            if part not in changes and key not in ("model", "images", "reference"):
                raise ValueError(f"{key!r} is not vq.…, calibration.…, sampling.…, model, images or reference")
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


def _paper(resolution: int, bits: int) -> Preset:
    """DiT-XL/2 with the paper's settings."""
    return Preset(
        name=f"dit-xl-2-{resolution}-w{bits}",
        model=f"facebook/DiT-XL-2-{resolution}",
        geometry=Geometry(sample_size=resolution // 8),
        vq=VQConfig(bits=bits, candidates=3),
        calibration=CalibrationConfig(checkpoint_every=50),
        sampling=SamplingConfig(steps=50, guidance_scale=1.5, batch_size=32),
        images=10_000,
        reference=None,
    )


def _bundled(bits: int) -> Preset:
    return Preset(
        name=f"{BUNDLED}-w{bits}",
        model=BUNDLED,
        geometry=Geometry(hidden=192, heads=3, depth=6, sample_size=8, classes=10),
        vq=VQConfig(bits=bits, candidates=3),
        calibration=CalibrationConfig(),
        sampling=SamplingConfig(steps=50, guidance_scale=1.5),
        images=1000,
        reference="fashion-mnist-test",
    )


PRESETS = {
    p.name: p
    for p in [
        *(_paper(resolution, bits) for resolution in (256, 512) for bits in (2, 3, 4)),
        *(_bundled(bits) for bits in (2, 3, 4)),
    ]
}
