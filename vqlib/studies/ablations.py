"""Ablations: rows of one model, a named setting and a seed each. Two groups that hold the same setting share its row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from vqlib.config import SamplingConfig
from vqlib.models.pipeline import Pipeline
from vqlib.studies.ablation_settings import Setting
from vqlib.studies.experiments import Experiments, VectorQuantized

COLUMNS = {"bits per weight": "bits_per_weight", "minutes of calibration": "calibration_minutes"}


@dataclass(frozen=True)
class Ablation:
    """Rows of one model under one way of measuring: `images` samples a row, the same sampling seeds in every row."""

    pipe: Pipeline
    folder: Path
    images: int
    sampling: SamplingConfig = SamplingConfig()
    reference: str | Path = "fashion-mnist-test"

    def row(self, setting: Setting, seed: int) -> dict:
        """The row of one setting and seed of codebooks and calibration; made where it is not finished."""
        self._experiments.make(*self._made_of(setting, seed), wait=True)
        return self.finished(setting, seed)

    def finished(self, setting: Setting, seed: int) -> dict | None:
        """The row if it has been made."""
        return self._experiments.rows.read(*self._made_of(setting, seed))

    def table(self, settings: Iterable[Setting], seeds: Iterable[int]) -> pd.DataFrame:
        """The finished rows: columns group, setting, seed, fd, accuracy, and the conditions that the rows do not share."""
        rows, seeds = [], list(seeds)
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds {seeds} repeat: a spread over them would be too small")
        for setting in settings:
            for seed in seeds:
                if (found := self.finished(setting, seed)) is not None:
                    row = {"group": setting.group, "setting": setting.name, "seed": seed}
                    row |= {name: found["metrics"][name] for name in ("fd", "accuracy", "precision", "recall")}
                    rows.append(row | {column: found[name] for column, name in COLUMNS.items()})
        return pd.DataFrame(rows, columns=["group", "setting", "seed", "fd"] if not rows else None)

    @cached_property
    def _experiments(self) -> Experiments:
        return Experiments(self.pipe, self.folder, self.reference)

    def _made_of(self, setting: Setting, seed: int) -> tuple:
        calibration = setting.calibration and setting.calibration.replace(seed=seed)
        method = VectorQuantized(setting.vq, calibration, seed)
        return self._experiments.made_of(method, self.images, self.sampling)


def summary(table: pd.DataFrame, quality: str = "fd") -> pd.DataFrame:
    """Mean and standard deviation over seeds of `quality` by group and setting, in the table's order; NaN with one seed."""
    found = table.groupby(["group", "setting"], sort=False)[quality].agg(["mean", "std", "count"]).reset_index()
    return found.rename(columns={"count": "seeds"})
