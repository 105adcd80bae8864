"""The methods of a table by their names, and the table's rows as experiments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vqlib.config import SamplingConfig, VQConfig, recipe_vq
from vqlib.evaluation.references import require_enough
from vqlib.models import pipeline
from vqlib.models.pipeline import Pipeline
from vqlib.models.sampling import require_fitting
from vqlib.studies.ablation_settings import HALF
from vqlib.studies.baselines.baseline import Baseline, FullPrecision, Moments
from vqlib.studies.baselines.gptq import GPTQ
from vqlib.studies.baselines.round_to_nearest import RoundToNearest
from vqlib.studies.experiments import Method, VectorQuantized, require_stages
from vqlib.studies.paper_table import FULL_PRECISION, PAPER
from vqlib.studies.row_tasks import Evaluated, Made, Measuring, stages_of
from vqlib.studies.table_rows import DISTILLED, Row, TableConfig
from vqlib.studies.tasks import rows_of
from vqlib.system.memory import device_label

GROUP_SIZES = {2: 32, 3: 64, 4: 64}  # bits -> weights a scale: uniform methods store at least as many bits as VQ


class Bench:
    """A table as a study: the model, how each method's transformer is made from it, and the rows as tasks.

    A pipeline that is not given is loaded, onto the GPU where there is one. `device`: of the machines that make the rows,
    the pipeline's own unless it is given. Raises ValueError for an unknown method, for fewer images than the features need, and
    for steps that the model's process has not.
    """

    def __init__(
        self, config: TableConfig, folder: str | Path, pipe: Pipeline | None = None, device: str | None = None
    ) -> None:
        for row in config.rows():
            if row.method not in METHODS:
                raise ValueError(f"method {row.method!r} is not one of {', '.join(METHODS)}")
            if row.method in ("RTN", "GPTQ") and row.bits not in GROUP_SIZES:
                known = f"a group's size is known for {list(GROUP_SIZES)} bits"
                raise ValueError(f"{row.method} at {row.bits} bits: {known}")
        for images in {row.images for row in config.rows()}:
            require_enough(config.reference, images)
        self.config, self.folder, self.pipe = config, Path(folder), pipe or pipeline.load(config.model, device="auto")
        device = device or device_label(self.pipe.device)
        self.how = Measuring.of(self.pipe, config.reference, device=device, shard=config.shard)
        for task in self.tasks():
            require_fitting(self.pipe, task.sampling)
            require_stages(self.pipe, *stages_of(task.made.method))

    def build(self, row: Row) -> Baseline:
        """The row's transformer, made or loaded."""
        return self.task(row).made.build(self.folder)

    def finished(self, row: Row) -> dict | None:
        """The stored row, None while it is missing."""
        return rows_of(self.folder).read(*self.task(row).made_of())

    def tasks(self) -> list[Evaluated]:
        """The rows in the table's order."""
        return [self.task(row) for row in self.config.rows()]

    def task(self, row: Row) -> Evaluated:
        """A row, found by method, model and conditions."""
        config = self.config
        sampling = SamplingConfig(row.steps, config.guidance_scale, batch_size=config.batch_size)
        made = Made(self.how, METHODS[row.method](config, row.bits))
        return Evaluated(made, row.images, sampling, config.bootstrap, label=str(row))


def _codes(table: TableConfig, vq: VQConfig, recipe: str | None = None, distilled: bool = False) -> VectorQuantized:
    """Codes, calibrated by a recipe or, without one, left as they are found; `distilled`: by the recipe's last stage, too."""
    feedback = vq.assignment == "error-feedback"
    moments = Moments(table.calibration(), table.hessian_batches) if feedback else None
    calibration = table.calibration(recipe) if recipe else None
    last = table.last_stage(recipe) if distilled else None
    return VectorQuantized(vq, calibration, moments=moments, distillation=last).seeded(table.seed)


def _nearest(bits: int) -> VQConfig:
    return VQConfig(bits=bits, candidates=1)


def _fed_back(bits: int) -> VQConfig:
    return VQConfig(bits=bits, candidates=1, assignment="error-feedback")


METHODS: dict[str, Callable[[TableConfig, int | None], Method]] = {
    FULL_PRECISION: lambda table, bits: FullPrecision(),
    "RTN": lambda table, bits: RoundToNearest(bits, GROUP_SIZES[bits]),
    "RTN, per channel": lambda table, bits: RoundToNearest(bits),
    "GPTQ": lambda table, bits: GPTQ(bits, GROUP_SIZES[bits], Moments(table.calibration(), table.hessian_batches)),
    "k-means": lambda table, bits: _codes(table, _nearest(bits)),
    "codebook only": lambda table, bits: _codes(table, _nearest(bits), table.recipe),
    "GPTVQ-like": lambda table, bits: _codes(table, _fed_back(bits)),
    "GPTVQ-like, calibrated": lambda table, bits: _codes(table, _fed_back(bits), table.recipe),
    PAPER: lambda table, bits: _codes(table, recipe_vq("paper", bits), "paper"),
    "VQ4DiT": lambda table, bits: _codes(table, recipe_vq(table.recipe, bits), table.recipe),
    DISTILLED: lambda table, bits: _codes(table, recipe_vq(table.recipe, bits, **HALF), table.recipe, distilled=True),
}
