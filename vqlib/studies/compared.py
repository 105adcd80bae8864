"""Rows compared image by image: their images have the same seeds, so a difference of two distances is resampled over the
images that both share, and what moves both alike falls out.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Generic, TypeVar

import torch
from torch import Tensor

from vqlib.evaluation.frechet import interval, replicates
from vqlib.evaluation.references import load_reference
from vqlib.studies.row_tasks import Evaluated
from vqlib.studies.tasks import rows_of

RESAMPLES = 200
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Compared(Generic[Key]):
    """Finished rows by their mean distance over seeds, with 95 % intervals over the images, alone and in pairs."""

    results: Mapping[Key, Sequence[dict]]  # a finished row a seed
    found: Mapping[Key, Tensor]  # replicates of the mean distance, float64 [resamples]

    @classmethod
    def of(
        cls, folder: str | Path, tasks: Mapping[Key, Sequence[Evaluated]], resamples: int = RESAMPLES
    ) -> Compared[Key]:
        """What of each row's tasks, one a seed, is finished in a study's folder. Replicates are kept there beside the rows."""
        folder, results, found = Path(folder), {}, {}
        for key, wanted in tasks.items():
            done = [(task, rows_of(folder).read(*task.made_of())) for task in wanted]
            done = [(task, result) for task, result in done if result]
            if done:
                parts = [_replicates(folder, task, resamples) for task, _ in done]
                results[key], found[key] = [result for _, result in done], torch.stack(parts).mean(dim=0)
        return cls(results, found)

    def mean(self, row: Key, figure: str) -> float:
        """Over the row's seeds; `figure`: one of the row's own or of its metrics. NaN where the model's judge does not tell it."""
        values = [(result | result["metrics"])[figure] for result in self.results[row]]
        return float("nan") if None in values else fmean(values)

    def alone(self, row: Key) -> tuple[float, float]:
        """The interval of a row's mean distance."""
        low, high = interval(self.mean(row, "fd"), self.found[row])
        return max(0.0, low), high

    def more(self, row: Key, than: Key) -> tuple[float, float, float]:
        """How much more a row's distance is than another's, and the interval of that: apart from 0, the images tell them apart.

        ValueError where the rows have other numbers of images: such images do not pair.
        """
        counts = [self.results[key][0]["metrics"]["images"] for key in (row, than)]
        if counts[0] != counts[1]:
            raise ValueError(f"{row} has {counts[0]} images, {than} {counts[1]}: rows compare with the same images")
        difference = self.mean(row, "fd") - self.mean(than, "fd")
        return difference, *interval(difference, self.found[row] - self.found[than])

    def verdict(self, row: Key, than: Key) -> str:
        """Whether a row is "ahead" of another or "behind" it beyond the interval of their difference, else "not apart"."""
        _, low, high = self.more(row, than)
        return "behind" if low > 0 else "ahead" if high < 0 else "not apart"


def _replicates(folder: Path, task: Evaluated, resamples: int) -> Tensor:
    """Of a finished row, float64 [resamples]; resampled once and kept."""
    rows, key = rows_of(folder), ("replicates within classes", *task.made_of(), resamples)

    def resampled(_: Path) -> dict:
        reference = load_reference(task.made.how.reference)
        real = reference.mean, reference.covariance
        return {"fd": replicates(task.features(folder), *real, resamples, labels=task.labels()).tolist()}

    rows.make(resampled, *key, wait=True)
    return torch.tensor(rows.read(*key)["fd"], dtype=torch.float64)
