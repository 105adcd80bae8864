"""What a results table consists of: its rows, and the settings that all of them share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vqlib.calibrator.hessians import BATCHES
from vqlib.config import CalibrationConfig, named
from vqlib.evaluation.image_sources import BLOCK
from vqlib.evaluation.references import OF_MODEL
from vqlib.models.pipeline import BUNDLED, BUNDLED_FLOW
from vqlib.studies.paper_table import FULL_PRECISION

DISTILLED = "VQ4DiT, distilled"


@dataclass(frozen=True)
class Row:
    """One line of the table: a method at some bits (None for full precision), `images` samples of `steps` steps."""

    method: str
    bits: int | None
    steps: int
    images: int

    def __str__(self) -> str:
        bits = "" if self.bits is None else f", {self.bits} bits"
        return f"{self.method}{bits}, {self.steps} steps, {self.images} images"


@dataclass(frozen=True)
class TableConfig:
    """One table. `methods`: (name, bits …); `longer`: (steps, images) at which `longer_methods` are sampled again."""

    model: str = BUNDLED
    reference: str = OF_MODEL[BUNDLED]
    images: int = 5000
    steps: int = 50
    guidance_scale: float = 1.5
    batch_size: int = 100  # images a forward
    iterations: int = 500  # of calibration
    distillation: int = 1000  # iterations of the last stage, of the rows that are distilled
    base: CalibrationConfig = CalibrationConfig()  # whose batch, trajectory and checkpoints a recipe takes
    recipe: str = "best"  # of every calibrated row but the paper's own
    shard: int = BLOCK  # images of a task; where the batch divides it, the figures do not depend on it
    hessian_batches: int = BATCHES
    bootstrap: int = 200  # resamples for FD's interval
    seed: int = 0  # of codebooks and calibration; image i is sampled with seed i
    methods: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("RTN", (4, 3, 2)),
        ("GPTQ", (4, 3, 2)),
        ("k-means", (4, 3, 2)),
        ("codebook only", (2,)),
        ("GPTVQ-like", (2,)),
        ("GPTVQ-like, calibrated", (2,)),
        ("VQ4DiT, paper's recipe", (2,)),
        ("VQ4DiT", (4, 3, 2)),
        (DISTILLED, (4, 3, 2)),
    )
    longer: tuple[tuple[int, int], ...] = ((100, 1000), (250, 400))
    longer_methods: tuple[tuple[str, int], ...] = (
        ("k-means", 3),
        ("VQ4DiT", 3),
        ("k-means", 2),
        ("VQ4DiT", 2),
        (DISTILLED, 2),
    )

    @property
    def caption(self) -> str:
        """Every condition that the rows share."""
        own = self.calibration()
        along = f"batch {own.batch_size}, {own.steps} steps, CFG {own.guidance_scale}, seed {own.seed}"
        distilled = any(name == DISTILLED and self._has(name) for name, _ in self.methods)
        last = f", {self.distillation} of the last stage where it is distilled" if distilled else ""
        return (
            f"{self.model}: {self.images} images, CFG {self.guidance_scale}, seeds from 0, reference {self.reference}, "
            f"{own.iterations} iterations of calibration (recipe {self.recipe}; {along}){last}. † quoted, in Inception's features."
        )

    def calibration(self, name: str | None = None) -> CalibrationConfig:
        """Of the calibrated rows, the paper's own or, without a name, every other one."""
        return named(name or self.recipe).run(self.base, iterations=self.iterations, seed=self.seed)

    def last_stage(self, name: str | None = None) -> CalibrationConfig:
        """What follows `calibration` in the rows that are distilled. ValueError where the recipe has no last stage."""
        memory = {"activation_checkpointing": self.base.activation_checkpointing}
        return named(name or self.recipe).last(self.calibration(name), iterations=self.distillation, **memory)

    def replace(self, **changes) -> TableConfig:
        """With other values; methods may be lists, as JSON and notebooks have them."""
        return dataclasses.replace(self, **{name: _tuples(value) for name, value in changes.items()})

    def rows(self) -> list[Row]:
        """Full precision first, then by bits, most first, in the order of `methods`; longer sampling at the end.

        Distilled rows are left out where the recipe has no last stage.
        """
        chosen = [(FULL_PRECISION, None)]
        for bits in sorted({bits for _, all_bits in self.methods for bits in all_bits}, reverse=True):
            chosen += [(name, bits) for name, all_bits in self.methods if bits in all_bits and self._has(name)]
        rows = [Row(name, bits, self.steps, self.images) for name, bits in chosen]
        again = [(FULL_PRECISION, None), *(row for row in self.longer_methods if self._has(row[0]))]
        return rows + [Row(name, bits, steps, images) for steps, images in self.longer for name, bits in again]

    def _has(self, method: str) -> bool:
        return method != DISTILLED or named(self.recipe).distillation is not None


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


TABLES = {  # by the name of the model; DiT-XL/2 needs one GPU, the hub, and ADM's reference file beside the notebook
    BUNDLED: TableConfig(),
    BUNDLED_FLOW: TableConfig(model=BUNDLED_FLOW, reference=OF_MODEL[BUNDLED_FLOW], images=1000, longer=()),
    "dit-xl-2-256": TableConfig(
        model="facebook/DiT-XL-2-256",
        reference="VIRTUAL_imagenet256_labeled.npz",
        images=10_000,
        batch_size=32,
        base=CalibrationConfig(activation_checkpointing=True),  # the last stage in 13 GiB instead of 56
        bootstrap=0,  # 2048 dimensions make a resample cost what the whole row's statistics do
        longer=((100, 10_000), (250, 10_000)),
    ),
}
