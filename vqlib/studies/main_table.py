"""The main table: methods × bits × steps on one model, row by row, here, on as many cores as are to spare, or on a cluster.

A finished row is one JSON file named by everything it depends on; a row being made is locked, its sampled batches are
kept. So the same call regenerates the table from nothing, goes on after a kill, and returns at once when all is there.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from vqlib.evaluation.evaluate import Metrics
from vqlib.models.pipeline import DATA, Pipeline
from vqlib.studies.bench import METHODS, Bench
from vqlib.studies.engines import complete, run
from vqlib.studies.on_ray import PLACES, engine
from vqlib.studies.paper_table import export
from vqlib.studies.row_tasks import Evaluated, release
from vqlib.studies.table_rows import TABLES, Row, TableConfig
from vqlib.studies.tasks import rows_of

__all__ = ["METHODS", "TABLES", "Bench", "Row", "TableConfig", "make_table", "read_table"]

FOLDER = DATA / "runs" / "tables"
MOST_WORKERS = 8


def make_table(
    config: TableConfig | None = None,
    folder: str | Path = FOLDER,
    workers: int = 1,
    report: Callable[[str], object] = print,
    pipe: Pipeline | None = None,
    on: str = "local",
    store: str = "",
) -> pd.DataFrame:
    """Make every missing row and return the table (see `read_table`).

    pipe: the table's model, already loaded; by default it is loaded, onto the GPU where there is one. workers > 1: as many
    processes on the CPU, one thread each, which samples faster than one process with that many threads; a GPU has work
    for one. `on`, `store`: see `on_ray.engine`. Raises RuntimeError naming the rows that failed, once the others are made.
    """
    config, at = config or TableConfig(), engine(on, 1, store)
    bench = Bench(config, folder, pipe, device=at.device if on == "ray" else None)
    at = at if on == "ray" else engine(on, workers if bench.how.device == "cpu" else 1)
    try:
        complete(_told(run(bench.folder, bench.tasks(), at), report))
    finally:
        release()
    return read_table(bench)


def _told(progress, report: Callable[[str], object]):
    """The same, a line told for every row made."""
    for one in progress:
        if one.outcome and one.outcome.state == "made" and isinstance(one.task, Evaluated):
            done = rows_of(one.folder).read(*one.task.made_of())["metrics"]
            report(f"{one.task}: FD {done['fd']:.3f} · {one}")
        yield one


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


def main(arguments: list[str] | None = None) -> None:
    """Regenerate the bundled model's table with one process a core, eight at most (one in all on a GPU), or on a cluster, and export it."""
    parser = argparse.ArgumentParser("python -m vqlib.studies.main_table", description=main.__doc__)
    parser.add_argument("--on", default="local", choices=PLACES)
    config, workers = TableConfig(), min(os.cpu_count() or 1, MOST_WORKERS)
    table = make_table(config, workers=workers, on=parser.parse_args(arguments).on)
    print("\n".join(map(str, export(table, config.caption, FOLDER).values())))


if __name__ == "__main__":
    main()
