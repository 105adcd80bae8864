"""Which way to few bits keeps the images of the second bundled model, a flow-matching transformer on colour emoji.

    python benchmarks/second_subject.py --seeds 0 1 2 --save second-subject-cpu

One row a method, bits and seed of codebooks and calibration, the first seed of every row before the second. Models are those of
the table `sit-mini-emoji` in data/runs/tables; the last stage and measured images are kept in data/runs/second-subject. A stopped
run goes on, and the table is written anew after every row.
"""

import argparse

import pandas as pd
import torch
from machine import add_options, device_name, report, versions

import vqlib
from vqlib.calibrator.runs import read_records
from vqlib.config import OTHER_TRAJECTORIES, SamplingConfig
from vqlib.evaluation.references import load_reference
from vqlib.figures.tables import markdown
from vqlib.models.pipeline import BUNDLED_FLOW, DATA
from vqlib.studies.baselines.baseline import Baseline, packed
from vqlib.studies.experiments import measure
from vqlib.studies.main_table import FOLDER as TABLES_FOLDER
from vqlib.studies.main_table import TABLES, Bench, Row
from vqlib.studies.paper_table import FULL_PRECISION, PAPER

FOLDER = DATA / "runs" / "second-subject"
TABLE = TABLES[BUNDLED_FLOW]
BEST, LAST = "VQ4DiT", "VQ4DiT, and its last stage"
TITLES = {BEST: "VQ4DiT, recipe `best`", LAST: "the same, and its last stage", PAPER: "VQ4DiT, recipe `paper`"}


def transformer(pipe: vqlib.Pipeline, method: str, bits: int | None, seed: int) -> Baseline:
    """The transformer of a row; calibrated once for the row with the last stage and the one without."""
    bench = Bench(TABLE.replace(seed=seed), TABLES_FOLDER, pipe)
    made = bench.build(Row(BEST if method == LAST else method, bits, TABLE.steps, TABLE.images))
    if method != LAST:
        return made
    sizes = {"iterations": TABLE.iterations, "guidance_scale": TABLE.guidance_scale}
    settings = vqlib.recipe_distillation("best", seed=seed + OTHER_TRAJECTORIES, **sizes)
    folder = FOLDER / f"last-{bits}-bits-seed-{seed}"
    model = vqlib.distill(pipe, made.model, settings, out=folder).finish()  # a finished run has no step left
    return packed(model, made.seconds + sum(record.seconds for record in read_records(folder)))


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of every method at its bits, with FD's standard deviation where there are two seeds or more."""
    groups = rows.groupby(["bits", "method"], sort=False)
    found = groups.agg(**{"stored bits": ("stored bits", "mean"), "seeds": ("seed", "count"), "FD": ("FD", "mean")})
    found["± (std)"] = groups["FD"].std()
    return found.join(groups[["accuracy", "minutes"]].mean()).reset_index()


def tell(options: argparse.Namespace, rows: list[dict]) -> None:
    """Print the rows that are finished, their means before them, and write both where asked."""
    table, count = pd.DataFrame(rows), load_reference(TABLE.reference).count
    formats = {"accuracy": ".3f", "FD": ".2f", "± (std)": ".2f", "minutes": ".1f", "stored bits": ".2f"}
    notes = [
        f"{device_name(options.device, options.threads)}; {versions('diffusers')}.",
        f"{options.images} images, {TABLE.steps} of Euler's steps, CFG {TABLE.guidance_scale} in sampling and calibration alike, image i "
        f"with seed i, classes in turn; reference {TABLE.reference} ({count} pictures, every class equally often), features of the "
        f"bundled classifier (FD, not FID); {TABLE.iterations} iterations of calibration and as many of the last stage, codebooks in "
        "float32; minutes: of iterations.",
        "",
        markdown(means(table), formats=formats),
    ]
    report("Quality at few bits, second bundled model", table, notes, options.save)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=TABLE.images)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--methods", nargs="+", default=["k-means", PAPER, BEST, LAST])
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, rows = vqlib.load(BUNDLED_FLOW, device=options.device), []
    sampling = SamplingConfig(steps=TABLE.steps, guidance_scale=TABLE.guidance_scale)
    jobs = [(method, bits, seed) for seed in options.seeds for bits in options.bits for method in options.methods]
    for method, bits, seed in [(FULL_PRECISION, None, 0), *jobs]:
        made = transformer(pipe, method, bits, seed)
        found = measure(pipe, made.model, options.images, FOLDER / "rows", sampling, bootstrap=200)
        row = {"bits": bits or "", "method": TITLES.get(method, method), "seed": seed if bits else ""}
        row |= {
            "stored bits": made.bits_per_weight,
            "FD": found.fd,
            "95 %": f"{found.fd_low:.2f} … {found.fd_high:.2f}",
        }
        row |= {"precision": found.precision, "recall": found.recall, "accuracy": found.accuracy}
        rows.append(row | {"minutes": made.seconds / 60})
        tell(options, rows)


if __name__ == "__main__":
    main()
