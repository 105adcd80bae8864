"""Packed models in figures: where the bits of a weight go, and what each way to run one costs."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vqlib.figures.layers import kinds_in_order, layer_place
from vqlib.figures.layout import headed, legended, note, panel
from vqlib.figures.sizes import SIZE_PARTS
from vqlib.figures.styles import FULL_PRECISION, METHOD_COLORS

MODE_STYLES = {  # how a model is run -> color and marker; modes are no methods, so they have colors of their own
    "speed mode": ("#0072B2", "s"),
    "memory mode": ("#D55E00", "o"),
    "memory mode, adaLN cached": ("#009E73", "D"),
    "speed mode, adaLN cached": ("#CC79A7", "^"),
}
OTHER_STYLE = ("#555555", "v")
FLOOR = "matrix products alone"


def bits_by_layer(report: pd.DataFrame, title: str | None = None) -> Figure:
    """Stored bits per weight, a bar per kind of layer (mean over blocks): codes, and the codebook on top.

    report: `vqlib.size_report`. The widths of the bars are the shares of all weights, so areas are bytes; the dotted
    line is the mean of all packed layers.
    """
    layers = report.dropna(subset=["k"])
    if layers.empty:
        raise ValueError("the report has no packed layers")
    kinds = pd.Series([layer_place(name)[1] for name in layers["layer"]], index=layers.index)
    weights = layers["shape"].map(lambda shape: np.prod([int(side) for side in shape.split("×")]))
    parts = layers[["codes_bytes", "codebook_bytes"]].assign(weights=weights).groupby(kinds, sort=False).sum()
    parts = parts.reindex(kinds_in_order(parts.index))
    widths = (parts["weights"] / parts["weights"].sum()).to_numpy()
    left = np.append(0.0, widths.cumsum()[:-1])
    codes, books = (8 * parts[f"{part}_bytes"] / parts["weights"] for part in ("codes", "codebook"))
    figure, axis = panel(0.42, 0.2)
    shape = {"width": widths, "align": "edge", "edgecolor": "white"}
    axis.bar(left, codes, color=SIZE_PARTS["codes"], label="codes", **shape)
    axis.bar(left, books, bottom=codes, color=SIZE_PARTS["codebooks"], label="codebooks", **shape)
    for middle, bottom, total in zip(left + widths / 2, codes, codes + books, strict=True):
        note(axis, f"{total:.2f}", (middle, bottom), (0, -3), ha="center", va="top", color="white")
    mean = 8 * parts[["codes_bytes", "codebook_bytes"]].to_numpy().sum() / parts["weights"].sum()
    axis.axhline(mean, color="#333333", linestyle=":", linewidth=1.0, label=f"all packed layers: {mean:.2f}")
    axis.set_xticks(left + widths / 2, parts.index)
    axis.tick_params(axis="x", length=0)
    axis.grid(False, axis="x")
    axis.set(xlim=(0, 1), ylim=(0, 1.12 * float((codes + books).max())), ylabel="bits per weight")
    axis.set_xlabel("bar width: share of all weights")
    return legended(figure, title, axis)


def mode_times(times: pd.DataFrame, title: str | None = None) -> Figure:
    """Time of a forward by mode and batch, relative to the same weights in dense layers; whiskers are quartiles.

    Columns batch, method, ratio, low, high (`vqlib.packed.timing.compare` per batch). The gray floor is method "matrix
    products alone": what no way to store the weights goes below.
    """
    batches = list(dict.fromkeys(times["batch"]))
    modes = [name for name in dict.fromkeys(times["method"]) if name not in (FULL_PRECISION, FLOOR)]
    if not modes:
        raise ValueError(f"methods {sorted(set(times['method']))} hold nothing to compare with {FULL_PRECISION!r}")
    figure, axis = panel(0.45, 0.25)
    rows = times.set_index(["batch", "method"])
    top = max(1.0, times["high"].max())
    for place, batch in enumerate(batches):
        if (batch, FLOOR) in rows.index:
            floor = rows.loc[(batch, FLOOR), "ratio"]
            axis.bar(place, floor, width=0.86, color="#DDDDDD", zorder=1, label=FLOOR if place == 0 else None)
        for i, mode in enumerate(modes):
            color, marker = MODE_STYLES.get(mode, OTHER_STYLE)
            row = rows.loc[(batch, mode)]
            x = place + (i - (len(modes) - 1) / 2) * 0.72 / len(modes)
            spread = [[row["ratio"] - row["low"]], [row["high"] - row["ratio"]]]
            shape = {"fmt": marker, "color": color, "capsize": 2, "elinewidth": 0.9, "zorder": 3}
            axis.errorbar(x, row["ratio"], yerr=np.abs(spread), **shape)
            note(axis, f"{row['ratio']:.2f}", (x, row["high"]), (0, 3), ha="center", color=color)
    axis.axhline(1.0, color=METHOD_COLORS[FULL_PRECISION], linewidth=1.0, zorder=2)
    axis.set_xticks(range(len(batches)), [f"{batch}" for batch in batches])
    axis.set(xlim=(-0.5, len(batches) - 0.5), ylim=(0, 1.12 * top), ylabel=f"time / {FULL_PRECISION}")
    axis.set_xlabel("images per forward, guided")
    axis.grid(False, axis="x")
    styles = [MODE_STYLES.get(mode, OTHER_STYLE) for mode in modes]
    handles = [Line2D([], [], color=color, marker=marker, linestyle="") for color, marker in styles]
    floors, names = axis.get_legend_handles_labels()
    return headed(figure, title, [*handles, *floors], [*modes, *names])
