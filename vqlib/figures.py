"""Data to matplotlib Figures, one function each: sizes come from the surrounding `style`, files from `save_figure`.

`with style("AAAI"): figure = loss_curves(frame)`, then `save_figure(figure, "data/figures/losses", data=frame)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from vqlib.grids import difference_map, image_grid
from vqlib.runs import Record
from vqlib.styles import METHOD_COLORS, VENUES, method_color, method_marker, new_figure, save_figure, style

__all__ = [
    "METHOD_COLORS",
    "VENUES",
    "save_figure",
    "style",
    "image_grid",
    "difference_map",
    "records_frame",
    "ratio_histograms",
    "loss_curves",
    "ratio_heatmap",
    "error_by_layer",
    "codewords_plot",
    "size_bars",
    "pareto",
]

KINDS = {  # the end of a quantized layer's name -> its short label, in the order of the forward pass
    "norm1.linear": "adaLN",
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.to_out.0": "out",
    "ff.net.0.proj": "MLP 1",
    "ff.net.2": "MLP 2",
}
SIZE_PARTS = {  # column of a size table -> color; parts of one file, so none of the methods' colors
    "weights": "#BBBBBB",
    "codes": "#0B3954",
    "codebooks": "#3A86B7",
    "biases": "#8FC1DE",
    "scales": "#B7D7E8",
    "unquantized": "#E3E3E3",
}


def records_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per record: iteration, loss, ratio_loss, seconds, frozen, moved, entropy, and the losses block_0 …"""
    rows = []
    for record in records:
        row = {
            "iteration": record.iteration,
            "loss": record.loss,
            "ratio_loss": record.ratio_loss,
            "seconds": record.seconds,
        }
        row |= {key: record.mean(key) for key in ("frozen", "moved", "entropy")}
        rows.append(row | {f"block_{i}": loss for i, loss in enumerate(record.block_losses)})
    return pd.DataFrame(rows)


def ratio_histograms(records: Iterable[Record], layer: str | None = None) -> pd.DataFrame:
    """Share of sub-vectors by largest ratio, of all layers or one: a row per iteration, a column per bin."""
    rows = {}
    for record in records:
        layers = record.layers.values() if layer is None else [record.layers[layer]]
        counts = np.sum([entry["histogram"] for entry in layers], axis=0)
        rows[record.iteration] = counts / max(counts.sum(), 1)
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("iteration")
    return frame.set_axis([i / frame.shape[1] for i in range(frame.shape[1])], axis=1)


def loss_curves(records: pd.DataFrame, title: str | None = None, smooth: int = 20) -> Figure:
    """Losses and frozen share against the iteration, faint as measured and strong as a moving mean over `smooth` steps.

    Columns: iteration, loss, and where there are such: ratio_loss, frozen. A column `run` gives one line per run.
    """
    panels = [(c, label) for c, label in _LOSS_PANELS if c in records and records[c].abs().sum() > 0]
    if not panels:
        raise ValueError(f"columns {list(records.columns)} hold none of {[c for c, _ in _LOSS_PANELS]}")
    width = mpl.rcParams["figure.figsize"][0]
    wide = width >= 5 and len(panels) > 1
    figure = new_figure(0.28 * width + 0.5 if wide else (0.23 * width + 0.12) * len(panels) + 0.4)
    axes = np.ravel(figure.subplots(1 if wide else len(panels), len(panels) if wide else 1, sharex=True, squeeze=False))
    runs = list(records.groupby("run", sort=False)) if "run" in records else [("VQ4DiT", records)]
    for axis, (column, label) in zip(axes, panels, strict=True):
        for name, run in runs:
            color = method_color(str(name))
            axis.plot(run["iteration"], run[column], color=color, alpha=0.25, linewidth=0.6)
            mean = run[column].rolling(smooth, min_periods=1, center=True).mean()
            axis.plot(run["iteration"], mean, color=color, label=str(name))
        axis.set_ylabel(label)
        if column == "loss":
            axis.set_yscale("log")
            _plain_log_ticks(axis.yaxis)
        elif column == "frozen":
            axis.set_ylim(0, 1)
    for axis in axes if wide else axes[-1:]:
        axis.set_xlabel("iteration")
    if not wide:
        figure.align_ylabels()
    return _headed(figure, title, *axes[0].get_legend_handles_labels() if len(runs) > 1 else ([], []))


_LOSS_PANELS = [("loss", "block loss"), ("ratio_loss", "ratio loss"), ("frozen", "frozen share")]


def ratio_heatmap(histograms: pd.DataFrame, title: str | None = None, freeze_above: float | None = 0.99) -> Figure:
    """Where the largest ratios of all sub-vectors are, step by step: rows of `ratio_histograms` as a heat map."""
    shares, steps = histograms.to_numpy(dtype=float), histograms.index.to_numpy(dtype=float)
    if shares.size == 0 or not (shares > 0).any():
        raise ValueError(f"histograms of shape {shares.shape} hold no counts")
    figure = new_figure(0.55 * mpl.rcParams["figure.figsize"][0])
    axis = figure.subplots()
    edges = np.append(steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)) - 0.5
    shown = np.ma.masked_less_equal(shares.T, 0)  # [steps, bins] -> [bins, steps]
    mesh = axis.pcolormesh(
        edges,
        np.linspace(0, 1, shares.shape[1] + 1),
        shown,
        cmap="viridis",
        norm=LogNorm(max(shown.min(), 1e-5), 1.0),
        rasterized=True,
    )
    if freeze_above is not None:
        axis.axhline(freeze_above, color=METHOD_COLORS["GPTVQ-like"], linewidth=0.8, linestyle="--")
        axis.annotate(
            f"frozen above {freeze_above:g}",
            (0.01, freeze_above),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            color=METHOD_COLORS["GPTVQ-like"],
            fontsize=mpl.rcParams["legend.fontsize"],
            annotation_clip=False,
        )
    axis.grid(False)
    axis.set(xlabel="iteration", ylabel="largest ratio", ylim=(0, 1))
    bar = figure.colorbar(mesh, ax=axis, pad=0.02, aspect=25)
    bar.set_label("share of sub-vectors")
    bar.outline.set_visible(False)
    if title:
        axis.set_title(title, pad=12 if freeze_above is not None else 4)
    return figure


def layer_place(name: str) -> tuple[int, str]:
    """(block, kind) of a quantized layer's name: 'transformer_blocks.3.attn1.to_q' -> (3, 'q')."""
    block = next((int(part) for part in name.split(".") if part.isdigit()), 0)
    kind = next((label for ending, label in KINDS.items() if name.endswith(ending)), name.rsplit(".", 1)[-1])
    return block, kind


def error_by_layer(errors: pd.DataFrame, title: str | None = None, label: str = "relative error") -> Figure:
    """Columns layer, error, and method to compare methods. One method: heat map of blocks and kinds; several: dots."""
    places = [layer_place(name) for name in errors["layer"]]
    table = errors.assign(block=[block for block, _ in places], kind=[kind for _, kind in places])
    kinds = [kind for kind in KINDS.values() if kind in set(table["kind"])]
    kinds += [kind for kind in table["kind"].unique() if kind not in kinds]
    draw = _error_dots if "method" in table and table["method"].nunique() > 1 else _error_map
    return draw(table, kinds, label, title)


def _error_map(table: pd.DataFrame, kinds: list[str], label: str, title: str | None) -> Figure:
    grid = table.pivot(index="kind", columns="block", values="error").loc[kinds]
    width = mpl.rcParams["figure.figsize"][0]
    figure = new_figure(0.45 * width + 0.2)
    axis = figure.subplots()
    mesh = axis.pcolormesh(
        np.arange(grid.shape[1] + 1) - 0.5, np.arange(len(kinds) + 1) - 0.5, grid.to_numpy(), cmap="viridis"
    )
    axis.set_yticks(range(len(kinds)), kinds)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=14))
    axis.invert_yaxis()
    axis.grid(False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("block")
    bar = figure.colorbar(mesh, ax=axis, pad=0.02, aspect=25)
    bar.set_label(label)
    bar.outline.set_visible(False)
    return _headed(figure, title)


def _error_dots(table: pd.DataFrame, kinds: list[str], label: str, title: str | None) -> Figure:
    """Per kind and method one dot per block, and a bar at their median."""
    methods = list(table["method"].unique())
    figure = new_figure(0.58 * mpl.rcParams["figure.figsize"][0] + 0.2)
    axis = figure.subplots()
    for i, method in enumerate(methods):
        color, shift = method_color(method), (i - (len(methods) - 1) / 2) * 0.8 / len(methods)
        for x, kind in enumerate(kinds):
            values = table.loc[(table["method"] == method) & (table["kind"] == kind), "error"]
            axis.scatter(
                [x + shift] * len(values),
                values,
                s=7,
                color=color,
                alpha=0.55,
                linewidths=0,
                marker=method_marker(method),
                label=method if x == 0 else None,
            )
            if len(values):
                axis.hlines(
                    values.median(),
                    x + shift - 0.32 / len(methods),
                    x + shift + 0.32 / len(methods),
                    color=color,
                    linewidth=1.4,
                )
    axis.set_yscale("log")
    axis.set_xticks(range(len(kinds)), kinds)
    axis.grid(False, axis="x")
    axis.set_ylabel(label)
    _plain_log_ticks(axis.yaxis)
    return _headed(figure, title, *axis.get_legend_handles_labels())


def codewords_plot(
    subvectors: np.ndarray,
    codewords: np.ndarray,
    counts: np.ndarray,
    title: str | None = None,
    axes: Sequence[str] = ("$w_1$", "$w_2$"),
) -> Figure:
    """Sub-vectors [N, 2] as a cloud, codewords [k, 2] with area ∝ their use `counts` [k], and the sorted use beside it.

    Torch tensors do as well. Unused codewords are crosses. More than 20,000 sub-vectors are thinned evenly.
    """
    points, centers, uses = (np.asarray(value, dtype=float) for value in (subvectors, codewords, counts))
    if points.shape[1:] != (2,) or centers.shape != (len(uses), 2):
        raise ValueError(
            f"sub-vectors {points.shape}, codewords {centers.shape}, counts {uses.shape}: need [N, 2], [k, 2], [k]"
        )
    width = mpl.rcParams["figure.figsize"][0]
    figure = new_figure(0.58 * width)
    cloud, usage = figure.subplots(1, 2, width_ratios=(1.55, 1))
    thin = points[:: max(1, len(points) // 20000)]
    cloud.scatter(*thin.T, s=0.6, color="#BBBBBB", linewidths=0, rasterized=True)
    used = uses > 0
    area = (4.0 if width < 5 else 12.0) * uses[used] / max(uses.mean(), 1e-12)
    cloud.scatter(
        *centers[used].T, s=area, color=METHOD_COLORS["VQ4DiT"], alpha=0.8, linewidths=0.2, edgecolors="white"
    )
    cloud.scatter(*centers[~used].T, s=14, color=METHOD_COLORS["GPTVQ-like"], marker="x", linewidths=0.8)
    limit = np.abs(np.concatenate([np.quantile(points, (0.0005, 0.9995), axis=0), centers])).max() * 1.04
    cloud.set(xlabel=axes[0], ylabel=axes[1], xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    order = np.sort(uses)[::-1]
    usage.fill_between(np.arange(len(order)), order, step="mid", color=METHOD_COLORS["VQ4DiT"], alpha=0.8, linewidth=0)
    usage.set(xlabel="codeword, by use", ylabel="sub-vectors", ylim=(0, None), xlim=(-0.5, len(order) - 0.5))
    empty = int((~used).sum())
    usage.text(0.97, 0.95, f"$k$ = {len(uses)}\n{empty} unused", transform=usage.transAxes, ha="right", va="top")
    return _headed(figure, title)


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
    figure = new_figure(0.21 * len(sizes) + 0.75)
    axis = figure.subplots()
    left = np.zeros(len(sizes))
    for part, column in zip(parts, values.T / divisor, strict=True):
        axis.barh(range(len(sizes)), column, left=left, height=0.62, color=SIZE_PARTS[part], label=part)
        left = left + column
    for y, total in enumerate(totals):
        factor = "" if y == 0 else f"  ({totals[0] / total:.1f}× smaller)"
        axis.annotate(
            f"{total / divisor:.4g} {unit}{factor}",
            (total / divisor, y),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=mpl.rcParams["legend.fontsize"],
        )
    axis.set_yticks(range(len(sizes)), sizes["method"])
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.set(xlabel=unit, xlim=(0, totals.max() / divisor * 1.28))
    return _headed(figure, title, *axis.get_legend_handles_labels())


def pareto(
    results: pd.DataFrame,
    title: str | None = None,
    size: str = "size_mib",
    quality: str = "fd",
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """Size against distance: columns method, size, quality; optional bits (printed) and low, high (an interval).

    Points of one method are joined; dashed steps: the best distance to be had at a size; dotted: full precision.
    """
    names = {"size_mib": "size (MiB)", "fd": "FD", **(labels or {})}
    figure = new_figure(0.62 * mpl.rcParams["figure.figsize"][0] + 0.25)
    axis = figure.subplots()
    table = results.dropna(subset=[size, quality])
    for method, points in table.groupby("method", sort=False):
        _pareto_method(axis, str(method), points.sort_values(size), size, quality)
    front = table.sort_values(size)
    axis.step(
        front[size],
        front[quality].cummin(),
        where="post",
        color="#777777",
        linewidth=0.7,
        linestyle=(0, (4, 3)),
        zorder=1,
    )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set(xlabel=names.get(size, size), ylabel=names.get(quality, quality))
    _plain_log_ticks(axis.xaxis)
    _plain_log_ticks(axis.yaxis)
    return _headed(figure, title, *axis.get_legend_handles_labels())


def _pareto_method(axis, method: str, points: pd.DataFrame, size: str, quality: str) -> None:
    color, marker = method_color(method), method_marker(method)
    if {"low", "high"} <= set(points):
        spread = np.abs(points[["low", "high"]].sub(points[quality], axis=0).to_numpy().T)
        axis.errorbar(points[size], points[quality], yerr=spread, fmt="none", ecolor=color, elinewidth=0.8, capsize=1.5)
    if method.lower().startswith("full precision"):
        axis.axhline(points[quality].iloc[0], color=color, linewidth=0.7, linestyle=":", zorder=1)
    big = 7 if marker == "*" else None
    axis.plot(points[size], points[quality], color=color, marker=marker, markersize=big, linewidth=0.9, label=method)
    if "bits" in points:
        for x, y, bits in points[[size, quality, "bits"]].itertuples(index=False):
            axis.annotate(f"{bits:g}", (x, y), xytext=(4, 3), textcoords="offset points", color=color, fontsize=6)


def _plain_log_ticks(side) -> None:
    """Plain figures on a log axis: 1, 2, 5 × 10ⁿ below two decades, where powers of ten would be too few."""
    low, high = side.get_view_interval()
    side.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    side.set_minor_formatter(NullFormatter())


def _headed(figure: Figure, title: str | None, handles: Sequence = (), labels: Sequence[str] = ()) -> Figure:
    """Title and legend above everything; the title is the legend's own where both are there, so they cannot collide."""
    if not handles:
        if title:
            figure.suptitle(title)
        return figure
    columns = min(len(handles), 3 if figure.get_figwidth() < 5 else 6)
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns, title=title, borderpad=0.1)
    legend.get_title().set_fontsize(mpl.rcParams["figure.titlesize"])
    return figure
