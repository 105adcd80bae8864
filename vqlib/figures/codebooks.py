"""Codebooks: codewords over the sub-vectors they stand for, and what start, iterations and geometry are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from vqlib.figures.layout import headed, legended, log_scale, page_width, panel
from vqlib.figures.styles import METHOD_COLORS, OTHER_COLORS, new_figure

STARTS = {"distinct": "#0072B2", "kmeans++": "#882255", "random": "#E69F00"}  # start method -> color


def codewords_plot(
    subvectors: np.ndarray,
    codewords: np.ndarray,
    counts: np.ndarray,
    title: str | None = None,
    axes: Sequence[str] = ("$w_1$", "$w_2$"),
) -> Figure:
    """Sub-vectors [N, 2] as a cloud, codewords [k, 2] with area ∝ their use `counts` [k], and the sorted use beside it.

    Torch tensors of any device do as well. Unused codewords are crosses. More than 20,000 sub-vectors are thinned evenly.
    """
    points, centers, uses = (_array(values) for values in (subvectors, codewords, counts))
    if points.shape[1:] != (2,) or centers.shape != (len(uses), 2):
        given = f"sub-vectors {points.shape}, codewords {centers.shape}, counts {uses.shape}"
        raise ValueError(f"{given}: need [N, 2], [k, 2], [k]")
    width = page_width()
    figure = new_figure(0.58 * width)
    cloud, usage = figure.subplots(1, 2, width_ratios=(1.55, 1))
    thin = points[:: max(1, len(points) // 20000)]
    cloud.scatter(*thin.T, s=0.6, color="#BBBBBB", linewidths=0, rasterized=True)
    used = uses > 0
    area = (4.0 if width < 5 else 12.0) * uses[used] / max(uses.mean(), 1e-12)
    blue = {"color": METHOD_COLORS["VQ4DiT"], "alpha": 0.8}
    cloud.scatter(*centers[used].T, s=area, linewidths=0.2, edgecolors="white", **blue)
    cloud.scatter(*centers[~used].T, s=14, color=METHOD_COLORS["GPTVQ-like"], marker="x", linewidths=0.8)
    limit = np.abs(np.concatenate([np.quantile(points, (0.0005, 0.9995), axis=0), centers])).max() * 1.04
    cloud.set(xlabel=axes[0], ylabel=axes[1], xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    order = np.sort(uses)[::-1]
    usage.fill_between(np.arange(len(order)), order, step="mid", linewidth=0, **blue)
    usage.set(xlabel="codeword, by use", ylabel="sub-vectors", ylim=(0, None), xlim=(-0.5, len(order) - 0.5))
    empty = int((~used).sum())
    usage.text(0.97, 0.95, f"$k$ = {len(uses)}\n{empty} unused", transform=usage.transAxes, ha="right", va="top")
    return headed(figure, title)


def _array(values: np.ndarray | Tensor) -> np.ndarray:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)


def convergence_plot(histories: pd.DataFrame, title: str | None = None) -> Figure:
    """Relative error of the weight after every pass of k-means: columns start, seed, iteration, error; a line per run."""
    figure, axis = panel(0.48)
    for start, runs in histories.groupby("start", sort=False):
        color = STARTS.get(str(start), OTHER_COLORS[0])
        for i, (_, run) in enumerate(runs.groupby("seed")):
            axis.plot(run["iteration"], run["error"], color=color, linewidth=0.9, label=None if i else str(start))
    log_scale(axis, "x")
    axis.set(xlabel="pass over all sub-vectors", ylabel="relative error")
    return legended(figure, title, axis)


def geometry_plot(errors: pd.DataFrame, title: str | None = None, bounds: Mapping[str, tuple] | None = None) -> Figure:
    """Relative error against bits per weight, codes alone: columns bits, d, error; a line per sub-vector length d.

    `bounds`: name -> (bits, errors), drawn as dashed lines.
    """
    figure, axis = panel(0.55)
    lengths = sorted(errors["d"].unique())
    shades = mpl.colormaps["viridis"](np.linspace(0.05, 0.8, len(lengths)))
    for length, color, marker in zip(lengths, shades, "osv^DPX<>"[: len(lengths)], strict=True):
        points = errors[errors["d"] == length].sort_values("bits")
        axis.plot(points["bits"], points["error"], color=color, marker=marker, label=f"$d$ = {length}")
    for (name, (bits, values)), dash in zip((bounds or {}).items(), ((4, 3), (1, 1.5), (6, 2, 1, 2)), strict=False):
        axis.plot(bits, values, color="#777777", linewidth=0.9, linestyle=(0, dash), label=name)
    log_scale(axis, "y")
    axis.set(xlabel="bits per weight, codes alone", ylabel="relative error")
    return legended(figure, title, axis)
