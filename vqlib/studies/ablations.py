"""Ablations: rows of one model, a named setting and a seed each. Two groups that hold the same setting share its row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import pandas as pd

from vqlib.config import SamplingConfig
from vqlib.evaluation.references import reference_of, require_enough
from vqlib.models.pipeline import Pipeline
from vqlib.models.sampling import require_fitting
from vqlib.studies.engines import complete, run
from vqlib.studies.experiments import Method, require_stages
from vqlib.studies.processes import Here
from vqlib.studies.row_tasks import Evaluated, Made, Measuring, stages_of
from vqlib.studies.tasks import Lazily, rows_of
from vqlib.system.memory import device_label

COLUMNS = {"bits per weight": "bits_per_weight", "minutes of calibration": "calibration_minutes"}


class Setting(Protocol):
    """A method under a name, in a group of others."""

    group: str
    name: str

    def method(self, seed: int) -> Method:
        """The method with that seed in all that it draws."""


@dataclass(frozen=True)
class Ablation:
    """Rows of one model under one way of measuring: `images` samples a row, the same sampling seeds in every row."""

    pipe: Pipeline
    folder: Path
    images: int
    sampling: SamplingConfig = SamplingConfig()
    reference: str | Path | None = None  # the bundled model's own unless given
    device: str = ""  # of the machines that make the rows, as `device_label` has it; the pipeline's own unless given

    def __post_init__(self) -> None:
        if self.reference is None:
            object.__setattr__(self, "reference", reference_of(self.pipe.name))
        require_enough(self.reference, self.images)
        require_fitting(self.pipe, self.sampling)

    def row(self, setting: Setting, seed: int) -> dict:
        """The row of one setting and seed of codebooks and calibration; made where it is not finished."""
        complete(run(self.folder, [self.task(setting, seed)], Here()))
        return self.finished(setting, seed)

    def tasks(self, settings: Iterable[Setting], seeds: Iterable[int]) -> Lazily:
        """Every setting with every seed, as a study for `engines.run`."""
        settings, seeds = list(settings), list(seeds)
        return Lazily(lambda: (self.task(setting, seed) for setting in settings for seed in seeds))

    def task(self, setting: Setting, seed: int) -> Evaluated:
        """A row, found by method, model and conditions. ValueError for steps that the model's process has not."""
        made = Made(self._how, setting.method(seed))
        require_stages(self.pipe, *stages_of(made.method))
        label = f"{setting.group}: {setting.name}, seed {seed}"
        return Evaluated(made, self.images, self.sampling, label=label)

    def finished(self, setting: Setting, seed: int) -> dict | None:
        """The row if it has been made."""
        return rows_of(self.folder).read(*self.task(setting, seed).made_of())

    def table(self, settings: Iterable[Setting], seeds: Iterable[int]) -> pd.DataFrame:
        """The finished rows: columns group, setting, seed, fd, accuracy, and the conditions that the rows do not share."""
        rows, seeds = [], distinct(seeds)
        for setting in settings:
            for seed in seeds:
                if (found := self.finished(setting, seed)) is not None:
                    row = {"group": setting.group, "setting": setting.name, "seed": seed}
                    row |= {name: found["metrics"][name] for name in ("fd", "accuracy", "precision", "recall")}
                    rows.append(row | {column: found[name] for column, name in COLUMNS.items()})
        return pd.DataFrame(rows, columns=["group", "setting", "seed", "fd"] if not rows else None)

    @cached_property
    def _how(self) -> Measuring:
        device = self.device or device_label(self.pipe.device)
        return Measuring.of(self.pipe, self.reference, device=device)


def distinct(seeds: Iterable[int]) -> list[int]:
    """The seeds as a list; ValueError where one is there twice."""
    seeds = list(seeds)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {seeds} repeat: a spread over them would be too small")
    return seeds


def summary(table: pd.DataFrame, quality: str = "fd") -> pd.DataFrame:
    """Mean and standard deviation over seeds of `quality` by group and setting, in the table's order; NaN with one seed."""
    found = table.groupby(["group", "setting"], sort=False)[quality].agg(["mean", "std", "count"]).reset_index()
    return found.rename(columns={"count": "seeds"})
