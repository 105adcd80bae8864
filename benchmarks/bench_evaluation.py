"""Minutes and peak memory of evaluating images that are there already, by their number: one process each.

    python benchmarks/bench_evaluation.py --threads 2

As a row of the main table is evaluated, in the bundled extractor's features: FD with 200 bootstrap resamples, IS,
Precision and Recall. The images are noise, made batch by batch: none of these figures depends on what they show.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pandas as pd
import torch
from machine import add_options, device_name, report, versions

import vqlib
from vqlib.system.memory import peak_memory

BATCH, BOOTSTRAP = 100, 200


def noise(count: int) -> Iterator[torch.Tensor]:
    """`count` images as uint8 batches [b, 1, 32, 32]."""
    generator = torch.Generator().manual_seed(0)
    for first in range(0, count, BATCH):
        shape = min(BATCH, count - first), 1, 32, 32
        yield torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def measure(count: int) -> None:
    """In a process of its own: evaluate, print seconds and bytes as JSON."""
    vqlib.evaluate(next(noise(BATCH)), allow_few=True, cache=None)  # loads what is loaded once
    before, start = peak_memory(), time.perf_counter()
    vqlib.evaluate(noise(count), labels=[0] * count, bootstrap=BOOTSTRAP, cache=None)
    print(json.dumps({"seconds": time.perf_counter() - start, "before": before, "peak": peak_memory()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 5_000, 10_000, 20_000])
    parser.add_argument("--one", type=int, help="what each process measures")
    add_options(parser, device=False)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        return measure(options.one)
    rows = []
    for count in options.counts:
        command = [sys.executable, __file__, "--one", str(count), "--threads", str(options.threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        row = {"images": count, "seconds": found["seconds"], "images/s": count / found["seconds"]}
        rows.append(row | {"before MiB": found["before"] / 2**20, "peak MiB": found["peak"] / 2**20})
    notes = [
        f"{device_name(threads=options.threads)}; {versions('torch-fidelity')}.",
        f"{BOOTSTRAP} bootstrap resamples, Precision and Recall against 10,000 reference images; peaks of whole processes.",
    ]
    report("Evaluation", pd.DataFrame(rows), notes, options.save)


if __name__ == "__main__":
    main()
