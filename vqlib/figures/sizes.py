"""What is stored: bytes by part, and size against quality."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vqlib.figures.layout import legended, log_scale, note, panel
from vqlib.figures.styles import FULL_PRECISION, method_color, method_looks

SIZE_PARTS = {  # column of a size table -> color; parts of one file, so none of the methods' colors
    "weights": "#BBBBBB",
    "codes": "#0B3954",
    "codebooks": "#3A86B7",
    "biases": "#8FC1DE",
    "scales": "#B7D7E8",
    "unquantized": "#E3E3E3",
}


def size_bars(sizes: pd.DataFrame, title: str | None = None) -> Figure:
    """Bytes by part, a bar a row: column method, and any of the columns of `SIZE_PARTS`, in bytes.

    The first row is the yardstick of "times smaller".
    """
    parts = [part for part in SIZE_PARTS if part in sizes and sizes[part].fillna(0).sum() > 0]
    if not parts:
        raise ValueError(f"columns {list(sizes.columns)} hold none of {list(SIZE_PARTS)}")
    values = sizes[parts].fillna(0).to_numpy(dtype=float)
    totals = values.sum(axis=1)
    divisor, unit = (2**20, "MiB") if totals.max() >= 2**20 else (2**10, "KiB")
    figure, axis = panel(0, 0.21 * len(sizes) + 0.75)
    left = np.zeros(len(sizes))
    for part, column in zip(parts, values.T / divisor, strict=True):
        axis.barh(range(len(sizes)), column, left=left, height=0.62, color=SIZE_PARTS[part], label=part)
        left = left + column
    for y, total in enumerate(totals):
        smaller = totals[0] / total
        factor = f"  ({smaller:.1f}× smaller)" if smaller >= 1 else f"  ({1 / smaller:.2f}× as large)"
        text = f"{total / divisor:.4g} {unit}{factor if y else ''}"
        note(axis, text, (total / divisor, y), (3, 0), va="center")
    axis.set_yticks(range(len(sizes)), sizes["method"])
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.set(xlabel=unit, xlim=(0, totals.max() / divisor * 1.28))
    return legended(figure, title, axis)


def pareto(
    results: pd.DataFrame,
    title: str | None = None,
    size: str = "size_mib",
    quality: str = "fd",
    labels: Mapping[str, str] | None = None,
    full_precision: float | None = None,
) -> Figure:
    """Size against distance: columns method, size, quality; optional bits (printed), low, high (an interval), open (hollow marks).

    Points of one method are joined; dashed steps: the best distance to be had at a size; dotted: full precision, a row or,
    where its size would be far off, the distance `full_precision` alone.
    """
    names = {"size_mib": "size (MiB)", "fd": "FD", **(labels or {})}
    figure, axis = panel(0.62, 0.25)
    table = results.dropna(subset=[size, quality])
    methods = dict(list(table.groupby(table["method"].astype(str), sort=False)))
    for method, look in method_looks(methods).items():
        _pareto_method(axis, method, look, methods[method].sort_values(size), size, quality)
    if full_precision is not None:
        color = method_color(FULL_PRECISION)
        axis.axhline(full_precision, color=color, linewidth=0.7, linestyle=":", label=FULL_PRECISION, zorder=1)
    front = table.sort_values(size)
    dashed = {"color": "#777777", "linewidth": 0.7, "linestyle": (0, (4, 3)), "zorder": 1}
    axis.step(front[size], front[quality].cummin(), where="post", **dashed)
    axis.set(xlabel=names.get(size, size), ylabel=names.get(quality, quality))
    log_scale(axis, "x", "y")
    return legended(figure, title, axis)


def _pareto_method(axis, method: str, look: tuple, points: pd.DataFrame, size: str, quality: str) -> None:
    color, marker = look
    if {"low", "high"} <= set(points):
        spread = np.abs(points[["low", "high"]].sub(points[quality], axis=0).to_numpy().T)
        axis.errorbar(points[size], points[quality], yerr=spread, fmt="none", ecolor=color, elinewidth=0.8, capsize=1.5)
    if method.lower().startswith("full precision"):
        axis.axhline(points[quality].iloc[0], color=color, linewidth=0.7, linestyle=":", zorder=1)
    big = 7 if marker == "*" else None
    line = {"color": color, "marker": marker, "markersize": big, "linewidth": 0.9}
    line |= {"markerfacecolor": "white"} if "open" in points and points["open"].all() else {}
    axis.plot(points[size], points[quality], **line, label=method)
    if "bits" in points:
        for x, y, bits in points[[size, quality, "bits"]].dropna().itertuples(index=False):
            note(axis, f"{bits:g}", (x, y), (4, 3), color=color, fontsize=6)
