"""Image quality against stored bits: recipe `best` with and without its last stage, and rival codes, each trained like it and not.

    python -m vqlib.studies.few_bits --images 5000 --seeds 0 1 2 --workers 2

Rows are made once and found again, as in every study; their images' features are kept, so that two rows compare image by image.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from vqlib.config import VQConfig, recipe, recipe_distillation, recipe_vq
from vqlib.figures.styles import FULL_PRECISION
from vqlib.figures.tables import markdown
from vqlib.models import pipeline
from vqlib.models.pipeline import BUNDLED, DATA
from vqlib.studies.ablation_settings import HALF
from vqlib.studies.ablations import Ablation, distinct
from vqlib.studies.baselines.additive import Additive
from vqlib.studies.baselines.baseline import FullPrecision, Moments
from vqlib.studies.baselines.lattice import Lattice
from vqlib.studies.baselines.low_rank import LowRank
from vqlib.studies.baselines.made import Trained
from vqlib.studies.compared import Compared
from vqlib.studies.engines import Progress, complete, run
from vqlib.studies.experiments import Method, VectorQuantized
from vqlib.studies.on_ray import engine

FOLDER = DATA / "runs" / "few-bits"
OURS = "VQ4DiT, recipe best"
CODES = {  # name -> how they differ from k 256, d 4 with a codebook a layer
    "k 256, d 2": HALF | {"bits": 4},
    "k 64, d 2": HALF | {"bits": 3},
    "k 512, d 4, one codebook": HALF | {"bits": None, "k": 512, "d": 4, "codebook_scope": "model"},
    "k 256, d 4": HALF,
    "k 256, d 4, one codebook": HALF | {"codebook_scope": "model"},
    "k 512, d 6, one codebook": HALF | {"bits": None, "k": 512, "d": 6, "codebook_scope": "model"},
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

    @property
    def series(self) -> str:
        """What rows belong to that differ in their bits alone."""
        trained = {"": "", NONE: ", not on the output"}.get(self.last, ", on the output")
        return self.group + trained

    def of(self, seeds: Iterable[int]) -> list[int]:
        """Of these seeds the ones that the row is made with: all where codes move, else the first."""
        return list(seeds)[: None if self.last == MOVING else 1]

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

    main = [ours(codes, MOVING) for codes in ("k 256, d 4, one codebook", "k 512, d 4, one codebook")]
    main += [ours(codes, MOVING) for codes in ("k 256, d 4", "k 512, d 6, one codebook")]
    alone = [ours("k 256, d 4, one codebook", NONE), ours("k 256, d 4", NONE), ours("k 256, d 4, one codebook", FIXED)]
    ends = [ours(codes, MOVING) for codes in ("k 64, d 2", "k 256, d 8, one codebook", "k 256, d 2")]
    return [
        Choice(FULL_PRECISION, "float16", "", FullPrecision()),
        *main,
        *rivals(FIXED),
        *ends,
        *alone,
        *rivals(NONE),
    ]


def compare(study: Ablation, rows: Iterable[Choice], seeds: Iterable[int]) -> Compared[Choice]:
    """What of `rows` is finished, with the seeds that each is made with. ValueError where a seed is there twice."""
    seeds = distinct(seeds)
    return Compared.of(study.folder, {row: [study.task(row, seed) for seed in row.of(seeds)] for row in rows})


def summary(compared: Compared[Choice]) -> pd.DataFrame:
    """A row each: method, codes, last stage, seeds, stored bits, FD, ± (std), low, high; × full precision and, in pairs,
    how much is above it (above, above low, above high), where full precision is among the rows; accuracy, minutes of training.
    """
    full, records = next((row for row in compared.results if row.group == FULL_PRECISION), None), []
    for row, own in compared.results.items():
        fds = pd.Series([result["metrics"]["fd"] for result in own])
        low, high = compared.alone(row)
        record = {"method": row.series, "codes": row.codes, "last stage": row.last, "seeds": len(own)}
        record |= {"stored bits": compared.mean(row, "bits_per_weight"), "FD": fds.mean(), "± (std)": fds.std()}
        record |= {"low": low, "high": high}
        if full:
            above = dict(zip(("above", "above low", "above high"), compared.more(row, full), strict=True))
            record |= {"× full precision": fds.mean() / compared.mean(full, "fd")} | above
        record |= {"accuracy": compared.mean(row, "accuracy"), "minutes": compared.mean(row, "calibration_minutes")}
        records.append(record)
    return pd.DataFrame(records)


def make(study: Ablation, rows: Iterable[Choice], seeds: Iterable[int], workers: int = 1) -> Iterator[Progress]:
    """The rows that are not finished, by so many processes, on a GPU by one. RuntimeError at the end names what failed."""
    seeds, last = distinct(seeds), None
    workers = workers if study.pipe.device.type == "cpu" else 1
    wanted = [study.task(row, seed) for row in rows for seed in row.of(seeds)]
    for last in run(study.folder, wanted, engine(workers=workers)):
        yield last
    complete([last])


def main() -> None:
    parser = argparse.ArgumentParser("python -m vqlib.studies.few_bits", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=BUNDLED, help="a bundled one, which has a reference of its own")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, nargs="+", help="their places in the list; all unless given")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options, known = parser.parse_args(), choices()
    if any(not 0 <= i < len(known) for i in options.rows or ()):
        parser.error(f"--rows {' '.join(map(str, options.rows))}: they have places 0 to {len(known) - 1}")
    study = Ablation(pipeline.load(options.model, device="auto"), options.folder, options.images)
    rows = known if options.rows is None else [known[i] for i in options.rows]
    for progress in make(study, rows, options.seeds, options.workers):
        print(progress, flush=True)
    print(markdown(summary(compare(study, rows, options.seeds))))


if __name__ == "__main__":
    main()
