"""The main table as a paper prints it: one line a method and bit width, with quoted figures in columns of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from vqlib.evaluation.evaluate import with_count
from vqlib.figures.styles import FULL_PRECISION
from vqlib.figures.tables import save_table
from vqlib.models.pipeline import DATA

QUOTED = DATA / "paper" / "fid.csv"
PAPER = "VQ4DiT, paper's recipe"  # what the quoted figures of VQ4DiT stand beside; row VQ4DiT is this library's own
MARK = "†"  # before the name of every quoted column
KEPT = ("sFID", "precision", "recall", "accuracy")


def quoted_figures(path: str | Path = QUOTED) -> pd.DataFrame:
    """FIDs that others report, as text: index (method, bits), a column a resolution; unknown ones are empty.

    `> 300` where only a bound is known; a count that is not 10,000, and the steps where stated, stand behind a figure. Several
    figures of one method, bits and resolution stand side by side.
    """
    known = pd.read_csv(path)
    known = known[known["fid"].notna()]
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for row in known.itertuples():
        text = f"> {row.fid:g}" if row.fid_qualifier == "over" else f"{row.fid:g}"
        notes = [f"{row.images / 1000:g}k"] if row.images == row.images and row.images != 10_000 else []
        notes += [f"{row.timesteps:g} steps"] if row.timesteps == row.timesteps else []
        text += f" ({', '.join(notes)})" if notes else ""
        method = PAPER if row.method == "VQ4DiT" else row.method
        own, column = cells.setdefault((method, row.bits), {}), f"{MARK} FID, {row.model} {row.resolution}"
        own[column] = f"{own[column]}, {text}" if column in own else text
    frame = pd.DataFrame.from_dict(cells, orient="index")
    frame.index = pd.MultiIndex.from_tuples(cells, names=["method", "bits"])
    return frame


def compact(table: pd.DataFrame, quoted: pd.DataFrame | None = None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """`main_table`'s rows as a paper's: every figure of the first row's steps and images, then the distances at the others.

    `quoted` adds its columns, and lines for methods that only others have run. With the table come the options that
    `save_table` and `markdown` print it with: the best of each bit width is bold, full precision and quoted lines are
    not ranked.
    """
    distance = next(name for name in table if name.startswith(("FID", "FD")))
    score = next(name for name in table if name.startswith("IS"))
    lines = table.groupby(["method", table["bits"].fillna(0)], sort=False)
    conditions = table.iloc[0][["steps", "images"]]
    rows = []
    for (method, bits), runs in lines:
        first = runs.iloc[0]
        if (first[["steps", "images"]] != conditions).any():
            continue  # not finished: figures of fewer images would stand under those of all others
        row = {"method": method, "bits": bits or None, "bits stored": first["bits per weight"]}
        row |= {"MiB": first["size (MiB)"], title(distance, first): first[distance]}
        row |= {name: first[name] for name in (KEPT[0], score, *KEPT[1:]) if name in table}
        row |= {title(distance, run): run[distance] for _, run in runs.iloc[1:].iterrows()}
        rows.append(row)
    frame = pd.DataFrame(rows)
    group = frame["bits"].where(frame["method"] != FULL_PRECISION)
    if quoted is not None:
        frame, group = _with_quoted(frame, group, quoted)
    ranked = [name for name in frame if name.startswith(("FID-", "FD-", "sFID"))]
    best = dict.fromkeys(ranked, "min") | dict.fromkeys([score, *KEPT[1:]], "max")
    formats = dict.fromkeys([*ranked, score, "bits stored", "MiB"], ".2f") | dict.fromkeys(KEPT[1:], ".3f")
    options = {
        "best": {name: how for name, how in best.items() if name in frame},
        "formats": {name: how for name, how in formats.items() if name in frame},
        "within": group,
    }
    return frame.astype({"bits": "Int64"}), options


def export(table: pd.DataFrame, caption: str, folder: str | Path) -> dict[str, Path]:
    """Write `main_table` (compact, with the quoted figures) and `all_rows` as CSV and LaTeX; {file name: path}."""
    frame, options = compact(table, quoted_figures())
    paths = [
        *save_table(table, Path(folder) / "all_rows", caption, "tab:all", wide=True).values(),
        *save_table(frame, Path(folder) / "main_table", caption, "tab:main", wide=True, **options).values(),
    ]
    return {path.name: path for path in paths}


def title(distance: str, run: pd.Series) -> str:
    """The distance with its count and steps: 'FD-5k (fashion), 50 steps'."""
    return f"{with_count(distance, int(run['images']))}, {run['steps']} steps"


def _with_quoted(frame: pd.DataFrame, group: pd.Series, quoted: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    keys = {(name, None if name == FULL_PRECISION else bits): cells for (name, bits), cells in quoted.iterrows()}
    places = [(row.method, None if row.method == FULL_PRECISION else row.bits) for row in frame.itertuples()]
    others = [key for key in keys if key not in places]
    only = pd.DataFrame([{"method": f"{name} {MARK}", "bits": bits} for name, bits in others])
    places, frame = places + others, pd.concat([frame, only], ignore_index=True) if others else frame
    for column in quoted:
        cells = [keys[place][column] if place in keys else None for place in places]
        frame[column] = [None if pd.isna(cell) else cell for cell in cells]
    return frame, group.reindex(range(len(frame)))
