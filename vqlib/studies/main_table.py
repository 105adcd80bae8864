"""The main table: methods × bits × steps on one model, row by row, by as many processes as there are cores to spare.

A finished row is one JSON file named by everything it depends on; a row being made is locked, its sampled batches are
kept. So the same call regenerates the table from nothing, goes on after a kill, and returns at once when all is there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from vqlib.evaluation.evaluate import Metrics
from vqlib.models.pipeline import DATA, Pipeline, load
from vqlib.studies.bench import METHODS, Bench
from vqlib.studies.paper_table import export
from vqlib.studies.table_rows import TABLES, Row, TableConfig

__all__ = ["METHODS", "TABLES", "Bench", "Row", "TableConfig", "make_table", "read_table"]

FOLDER = DATA / "runs" / "tables"
MOST_WORKERS = 8
WORKER = "VQLIB_TABLE_WORKER"  # set in the environment of a worker process


def make_table(
    config: TableConfig | None = None,
    folder: str | Path = FOLDER,
    workers: int = 1,
    report: Callable[[str], object] = print,
    pipe: Pipeline | None = None,
) -> pd.DataFrame:
    """Make every missing row and return the table (see `read_table`).

    pipe: the table's model, already loaded; by default it is loaded, onto the GPU where there is one. workers > 1: as many
    processes on the CPU, one thread each, which samples faster than one process with that many threads; a GPU has work
    for one. Raises RuntimeError where a worker failed.
    """
    config = config or TableConfig()
    bench = Bench(config, folder, pipe)
    if workers > 1 and bench.pipe.device.type == "cpu":
        _start_workers(config, Path(folder), workers)
    _fill(bench, report)
    return read_table(bench)


def read_table(bench: Bench) -> pd.DataFrame:
    """The finished rows in the table's order, every condition and figure a column; missing rows are left out."""
    rows = []
    for row in bench.config.rows():
        if (found := bench.finished(row)) is None:
            continue
        metrics = Metrics.from_dict(found["metrics"])
        conditions = {"method": row.method, "bits": row.bits, "bits per weight": found["bits_per_weight"]}
        conditions |= {"size (MiB)": found["size_bytes"] / 2**20, "steps": row.steps}
        conditions |= {"CFG": bench.config.guidance_scale, "seeds": f"0–{row.images - 1}"}
        rows.append(metrics.to_row(**conditions) | {"minutes": found["minutes"]})
    table = pd.DataFrame(rows)
    return table.astype({"bits": "Int64"}) if rows else table


def _fill(bench: Bench, report: Callable[[str], object]) -> None:
    """Make the rows that nobody has, one after the other, and say how far the whole table is."""
    rows, start = bench.config.rows(), time.monotonic()
    before = sum(row.cost for row in rows if bench.finished(row) is None)
    for row in rows:
        if bench.finished(row) is not None or not bench.make(row):
            continue
        missing = [other for other in rows if bench.finished(other) is None]
        left, spent = sum(other.cost for other in missing), (time.monotonic() - start) / 60
        done = bench.finished(row)["metrics"]
        eta = spent * left / max(before - left, 1)
        report(f"{row}: FD {done['fd']:.3f} · {len(rows) - len(missing)} of {len(rows)} rows, about {eta:.0f} min left")


def _start_workers(config: TableConfig, folder: Path, workers: int) -> None:
    """Run `workers` processes of this module on the same folder and wait for them."""
    job = json.dumps({"config": dataclasses.asdict(config), "folder": str(folder.absolute())})
    places = [str(DATA.parent), *filter(None, [os.environ.get("PYTHONPATH")])]  # this source tree, installed or not
    environment = os.environ | {WORKER: job, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    running = [
        subprocess.Popen([sys.executable, "-m", "vqlib.studies.main_table"], env=environment) for _ in range(workers)
    ]
    try:
        codes = [process.wait() for process in running]
    finally:
        for process in running:
            process.terminate()
    if any(codes):
        raise RuntimeError(f"{sum(map(bool, codes))} of {workers} table workers failed; finished rows are in {folder}")


def _work() -> None:
    """What a worker does: the job is in its environment, the first worker to come takes the first row."""
    job = json.loads(os.environ.pop(WORKER))
    torch.set_num_threads(1)
    config = TableConfig().replace(**job["config"])
    _fill(Bench(config, job["folder"], load(config.model, device="cpu")), lambda line: print(line, flush=True))


def main() -> None:
    """Regenerate the bundled model's table with one process a core (one in all on a GPU) and export it."""
    config = TableConfig()
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    paths = export(make_table(config, workers=workers), config.caption, FOLDER)
    print("\n".join(map(str, paths.values())))


if __name__ == "__main__":
    _work() if WORKER in os.environ else main()
