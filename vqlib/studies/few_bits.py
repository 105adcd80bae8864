"""Image quality against stored bits: recipe `best` with and without its last stage, and rival codes, each trained like it and not.

    python -m vqlib.studies.few_bits --images 5000 --seeds 0 1 2 --workers 2

Rows are made once and found again, as in every study; their images' features are kept, so that two rows compare image by image.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from vqlib.config import VQConfig, recipe, recipe_distillation, recipe_vq
from vqlib.evaluation.frechet import interval, replicates
from vqlib.evaluation.references import load_reference
from vqlib.figures.tables import markdown
from vqlib.models import pipeline
from vqlib.models.pipeline import BUNDLED, DATA
from vqlib.studies.ablations import Ablation
from vqlib.studies.baselines.additive import Additive
from vqlib.studies.baselines.baseline import FullPrecision, Moments
from vqlib.studies.baselines.lattice import Lattice
from vqlib.studies.baselines.low_rank import LowRank
from vqlib.studies.baselines.made import Trained
from vqlib.studies.engines import complete, run
from vqlib.studies.experiments import Method, VectorQuantized
from vqlib.studies.on_ray import engine

FOLDER = DATA / "runs" / "few-bits"
OURS = "VQ4DiT, recipe best"
HALF = {"codebook_dtype": "float16"}
CODES = {  # name -> how they differ from k 256, d 4 with a codebook a layer
    "k 256, d 2": HALF | {"bits": 4},
    "k 64, d 2": HALF | {"bits": 3},
    "k 256, d 4": HALF,
    "k 256, d 4, one codebook": HALF | {"codebook_scope": "model"},
    "k 64, d 4": HALF | {"bits": None, "k": 64, "d": 4},
    "k 256, d 8, one codebook": HALF | {"bits": None, "k": 256, "d": 8, "codebook_scope": "model"},
}
NONE, FIXED, MOVING = "none", "codes stay", "codes move"  # what trains on the output


@dataclass(frozen=True)
class Choice:
    """A row: whose codes, which, and what of them is trained on the model's output."""

    group: str
    codes: str
    last: str
    how: Method

    @property
    def name(self) -> str:
        return f"{self.codes} ({self.last})" if self.last else self.codes

    def method(self, seed: int) -> Method:
        """The row's method; full precision, which has no last stage, has no seed either."""
        return self.how if isinstance(self.how, FullPrecision) else self.how.seeded(seed)


def choices(**sizes: int) -> list[Choice]:
    """Every row, the most telling first; `sizes`: iterations, batch_size, steps of all trainings, where they are to be others."""
    last = {NONE: None, FIXED: recipe_distillation("best", lr_latents=0.0, **sizes)}
    last[MOVING] = recipe_distillation("best", **sizes)
    settings = recipe("best", **sizes)

    def ours(codes: str, stage: str) -> Choice:
        vq: VQConfig = recipe_vq("best", **({"bits": 2} | CODES[codes]))
        return Choice(OURS, codes, stage, VectorQuantized(vq, settings, distillation=last[stage]))

    def rivals(stage: str) -> list[Choice]:
        how = Trained(Moments(settings), last[stage])
        return [
            Choice("additive, AQLM-like", "2 × k 256, d 8", stage, Additive(how)),
            Choice("one codebook, a scale a row", "k 256, d 4", stage, Additive(how, d=4, books=1)),
            Choice("lattice, QuIP#-like", "E8P, rotated", stage, Lattice(how)),
            Choice("low rank, SVDQuant-like", "2 bits a row, rank 3", stage, LowRank(how, rank=3)),
            Choice("additive, AQLM-like", "2 × k 64, d 8", stage, Additive(how, k=64)),
            Choice("additive, AQLM-like", "2 × k 512, d 8", stage, Additive(how, k=512)),
        ]

    main = [ours(codes, MOVING) for codes in ("k 256, d 4, one codebook", "k 256, d 4", "k 64, d 4")]
    alone = [ours("k 256, d 4, one codebook", NONE), ours("k 256, d 4", NONE), ours("k 256, d 4, one codebook", FIXED)]
    ends = [ours(codes, MOVING) for codes in ("k 64, d 2", "k 256, d 8, one codebook", "k 256, d 2")]
    return [
        Choice("full precision", "float16", "", FullPrecision()),
        *main,
        *rivals(FIXED),
        *ends,
        *alone,
        *rivals(NONE),
    ]


def table(study: Ablation, rows: Iterable[Choice], seeds: Iterable[int]) -> pd.DataFrame:
    """The finished rows, one a seed: group, codes, last stage, seed, stored bits, FD, accuracy, minutes of training."""
    rows, seeds = list(rows), list(seeds)
    found = pd.concat([study.table([row], seeds if row.last else seeds[:1]) for row in rows], ignore_index=True)
    about = {(row.group, row.name): row for row in rows}
    keys = list(zip(found["group"], found["setting"], strict=True))
    found.insert(1, "codes", [about[key].codes for key in keys])
    found.insert(2, "last stage", [about[key].last for key in keys])
    names = {"bits per weight": "stored bits", "minutes of calibration": "minutes", "fd": "FD"}
    return found.rename(columns=names)


@dataclass(frozen=True)
class Compared:
    """Mean distances over the seeds of rows of the same images, with 95 % intervals over the images, alone and in pairs."""

    distances: Mapping[str, float]  # by row
    found: Mapping[str, Tensor]  # replicates, float64 [resamples]

    @classmethod
    def of(cls, study: Ablation, rows: Mapping[str, Choice], seeds: Mapping[str, Iterable[int]], resamples: int = 200):
        """By rows' names and their seeds: distances as the rows have them, replicates from their images' kept features."""
        reference = load_reference(study.reference)
        distances, found = {}, {}
        for name, row in rows.items():
            own = [study.features(row, seed) for seed in seeds[name]]
            finished = [study.finished(row, seed)["metrics"]["fd"] for seed in seeds[name]]
            distances[name] = sum(finished) / len(finished)
            parts = [replicates(x, reference.mean, reference.covariance, resamples) for x in own]
            found[name] = torch.stack(parts).mean(dim=0)
        return cls(distances, found)

    def alone(self, name: str) -> tuple[float, float]:
        """The interval of a row's distance."""
        return interval(self.distances[name], self.found[name])

    def more(self, name: str, than: str) -> tuple[float, float, float]:
        """How much more a row's distance is than another's, and the interval of that: apart from 0, the images tell them apart."""
        difference = self.distances[name] - self.distances[than]
        return difference, *interval(difference, self.found[name] - self.found[than])


def main() -> None:
    parser = argparse.ArgumentParser("python -m vqlib.studies.few_bits", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=BUNDLED, help="a bundled one, which has a reference of its own")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, nargs="+", help="their places in the list; all unless given")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    study = Ablation(pipeline.load(options.model, device="auto"), options.folder, options.images)
    rows = choices() if options.rows is None else [choices()[i] for i in options.rows]
    wanted = [study.task(row, seed) for row in rows for seed in (options.seeds if row.last else options.seeds[:1])]
    for progress in run(options.folder, wanted, engine(workers=options.workers)):
        print(progress, flush=True)
        last = progress
    complete([last])
    print(markdown(table(study, rows, options.seeds)))


if __name__ == "__main__":
    main()
