"""Image quality against stored bits on the bundled model: recipe `best`, and what its last stage adds.

    python benchmarks/few_bits.py --images 1000 --save few-bits-cpu

One row a choice of codes and of what follows calibration; models and measured images are kept in data/runs/few-bits, so that
a stopped run goes on, and processes that work on the same folder share the rows.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from machine import add_options, device_name, report, versions

import vqlib
from vqlib.calibrator.runs import read_records
from vqlib.studies.experiments import measure, packed_model

FOLDER = Path(__file__).parents[1] / "data" / "runs" / "few-bits"
SMALLER = tuple((pattern, 128, 4) for pattern in ("*norm1.linear", "*to_q", "*to_k"))
CODES = {
    "k 256, d 4, a codebook a layer in float32": {},
    "k 256, d 4, a codebook a layer": {"codebook_dtype": "float16"},
    "k 256, d 4, one codebook for all": {"codebook_dtype": "float16", "codebook_scope": "model"},
    "k 128, d 4 for adaLN, q, k; 256 for the others": {"codebook_dtype": "float16", "layers": SMALLER},
    "k 64, d 4, a codebook a layer": {"codebook_dtype": "float16", "bits": None, "k": 64, "d": 4},
}
LAST = {
    "none": None,
    "output, teacher's path": {"path": "teacher", "lr_latents": 0.0},
    "output, own path": {"lr_latents": 0.0},
    "output, own path, assignments follow": {},
}
ROWS = [
    *((next(iter(CODES)), last) for last in list(LAST)[:1]),
    *((list(CODES)[1], last) for last in LAST),
    *((codes, list(LAST)[-1]) for codes in list(CODES)[2:]),
]


def transformer(pipe: vqlib.Pipeline, codes: str, last: str, seed: int) -> tuple[torch.nn.Module, float]:
    """The packed transformer of a row, and the minutes of its optimizer steps; calibrated once for all of its last stages."""
    vq, settings = vqlib.recipe_vq("best", **({"bits": 2} | CODES[codes])), vqlib.recipe("best", seed=seed)
    start = FOLDER / f"codes-{list(CODES).index(codes)}-seed-{seed}"
    model, runs = packed_model(pipe, vq, settings, start, seed), [start / "calibration"]
    if LAST[last] is not None:
        final = vqlib.recipe_distillation("best", seed=seed + 1000, **LAST[last])
        runs.append(start / f"last-{list(LAST).index(last)}")
        model = vqlib.distill(pipe, model, final, out=runs[-1]).finish()  # a finished run has no step left
    return model, sum(record.seconds for run in runs for record in read_records(run)) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(-1, len(ROWS))), help="-1: full precision")
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, rows = vqlib.load("dit-mini-fashion", device=options.device), []
    for index, seed in [(i, s) for i in options.rows for s in (options.seeds if i >= 0 else [0])]:
        codes, last = ROWS[index] if index >= 0 else ("full precision", "")
        model, minutes = (pipe.transformer, 0.0) if index < 0 else transformer(pipe, codes, last, seed)
        bits = 16.0 if index < 0 else vqlib.size_report(model).attrs["bits_per_weight"]
        found = measure(pipe, model, options.images, FOLDER / "rows", bootstrap=200)
        row = {"codes": codes, "last stage": last, "seed": seed, "stored bits": bits, "FD": found.fd}
        row |= {"95 %": f"{found.fd_low:.3f} … {found.fd_high:.3f}", "accuracy": found.accuracy, "minutes": minutes}
        rows.append(row)
        print(row, flush=True)
    notes = [
        f"{device_name(options.device, options.threads)}; {versions('diffusers')}.",
        f"{options.images} images, 50 steps, CFG 1.5, image i with seed i, reference fashion-mnist-test, features of the bundled "
        "classifier (FD, not FID); recipe `best`, 500 iterations, and 500 of its last stage; minutes: of optimizer steps.",
    ]
    report("Quality against stored bits, bundled model", pd.DataFrame(rows), notes, options.save)


if __name__ == "__main__":
    main()
