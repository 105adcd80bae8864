"""Which way to few bits keeps the images of the second bundled model, a flow-matching transformer on colour emoji.

    python benchmarks/second_subject.py --images 1000 --seeds 0 1 2 --save second-subject-cpu

One row a method, bits and seed of codebooks and calibration; models and measured images are kept in data/runs/second-subject, so
that a stopped run goes on; the table is written anew after every row, the first seed of every row before the second.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from machine import add_options, device_name, report, versions

import vqlib
from vqlib.calibrator.runs import read_records
from vqlib.config import SamplingConfig
from vqlib.evaluation.references import load_reference, reference_of
from vqlib.figures.tables import markdown
from vqlib.models.pipeline import BUNDLED_FLOW
from vqlib.studies.experiments import measure, packed_model

FOLDER = Path(__file__).parents[1] / "data" / "runs" / "second-subject"
LAST = "best, and its last stage"
METHODS = ("k-means", "paper", "best", LAST)
BITS = (2, 3)
GUIDANCE = 1.5  # of calibration and sampling alike
STEPS = 50
FULL = "full precision"


def transformer(pipe: vqlib.Pipeline, method: str, bits: int, seed: int) -> tuple[torch.nn.Module, float]:
    """The packed transformer of a row, and the minutes of its optimizer steps; `best` is calibrated once for both of its rows."""
    if method == "k-means":
        return packed_model(pipe, vqlib.VQConfig(bits=bits, candidates=1), None, _folder(method, bits, seed), seed), 0.0
    name = method.partition(",")[0]
    start = _folder(name, bits, seed)
    settings = vqlib.recipe(name, seed=seed, guidance_scale=GUIDANCE)
    model, runs = packed_model(pipe, vqlib.recipe_vq(name, bits=bits), settings, start, seed), [start / "calibration"]
    if method == LAST:
        final = vqlib.recipe_distillation(name, seed=seed + 1000, guidance_scale=GUIDANCE)
        runs.append(start / "last")
        model = vqlib.distill(pipe, model, final, out=runs[-1]).finish()  # a finished run has no step left
    return model, sum(record.seconds for run in runs for record in read_records(run)) / 60


def _folder(method: str, bits: int, seed: int) -> Path:
    return FOLDER / f"{method}-{bits}-bits-seed-{seed}"


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of every method at its bits, with FD's standard deviation where there are two seeds or more."""
    groups = rows.groupby(["method", "bits"], sort=False, dropna=False)
    found = groups.agg(seeds=("seed", "count"), stored=("stored bits", "mean"), FD=("FD", "mean"), std=("FD", "std"))
    found = found.join(groups[["accuracy", "minutes"]].mean()).reset_index()
    return found.rename(columns={"stored": "stored bits", "std": "± (std)"})


def tell(options: argparse.Namespace, rows: list[dict]) -> None:
    """Print the rows that are finished, their means before them, and write both where asked."""
    table = pd.DataFrame(rows)
    notes = [
        f"{device_name(options.device, options.threads)}; {versions('diffusers')}.",
        f"{options.images} images, {STEPS} steps of Euler's, CFG {GUIDANCE} in calibration and sampling, image i with seed i, classes in "
        f"turn, reference {reference_of(BUNDLED_FLOW)} ({options.test_images} test pictures), features of the bundled classifier (FD, not FID); "
        "500 iterations of calibration, and 500 of the last stage; minutes: of optimizer steps.",
        "",
        markdown(means(table), formats={"accuracy": ".3f", "FD": ".2f", "± (std)": ".2f", "minutes": ".1f"}),
    ]
    report("Quality at few bits, second bundled model", table, notes, options.save)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, rows = vqlib.load(BUNDLED_FLOW, device=options.device), []
    options.test_images = load_reference(reference_of(BUNDLED_FLOW)).count
    sampling = SamplingConfig(steps=STEPS, guidance_scale=GUIDANCE)
    jobs = [(seed, bits, method) for seed in options.seeds for bits in options.bits for method in options.methods]
    for seed, bits, method in [(0, None, FULL), *jobs]:
        model, minutes = (pipe.transformer, 0.0) if bits is None else transformer(pipe, method, bits, seed)
        stored = 16.0 if bits is None else vqlib.size_report(model).attrs["bits_per_weight"]
        found = measure(pipe, model, options.images, FOLDER / "rows", sampling, bootstrap=200)
        row = {"method": method, "bits": bits or 16, "seed": seed, "stored bits": stored, "FD": found.fd}
        row |= {
            "95 %": f"{found.fd_low:.2f} … {found.fd_high:.2f}",
            "precision": found.precision,
            "recall": found.recall,
        }
        rows.append(row | {"accuracy": found.accuracy, "minutes": minutes})
        tell(options, rows)


if __name__ == "__main__":
    main()
