"""A calibration run's records as tables and figures: losses, frozen share, where the largest ratios are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vqlib.calibrator.runs import Record
from vqlib.figures.layout import by_run, color_bar, headed, legended, log_scale, note, page_width, panel
from vqlib.figures.styles import METHOD_COLORS, method_marker, new_figure, run_colors

LOSSES = {"loss": "block loss", "output_loss": "output loss"}
RATIO_PANELS = {"entropy": "entropy (nats)", "frozen": "frozen share", "moved": "winner not the first"}


def records_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per record: iteration, loss, ratio_loss, seconds, memory (bytes), unused codewords, the means of frozen,
    moved and entropy over all sub-vectors, the losses block_0 …, and output_loss where a record has one."""
    rows = []
    for record in records:
        row = {key: getattr(record, key) for key in ("iteration", "loss", "ratio_loss", "seconds", "memory")}
        row |= {"unused": sum(layer["unused"] for layer in record.layers.values())}
        row |= {key: record.mean(key) for key in ("frozen", "moved", "entropy")}
        row |= {} if record.output_loss is None else {"output_loss": record.output_loss}
        rows.append(row | {f"block_{i}": loss for i, loss in enumerate(record.block_losses)})
    return pd.DataFrame(rows)


def layer_frame(records: Iterable[Record], key: str) -> pd.DataFrame:
    """A per-layer figure of every record (`frozen`, `moved`, `entropy`, `unused`): a row per iteration, a column per layer."""
    rows = {record.iteration: {n: layer[key] for n, layer in record.layers.items()} for record in records}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("iteration")


def ratio_histograms(records: Iterable[Record], layer: str | None = None) -> pd.DataFrame:
    """Share of sub-vectors by largest ratio, of all layers or one: a row per iteration, a column per bin.

    Raises ValueError for a run with n = 1, which has no ratios.
    """
    rows = {}
    for record in records:
        layers = record.layers.values() if layer is None else [record.layers[layer]]
        histograms = [entry["histogram"] for entry in layers if "histogram" in entry]
        if not histograms:
            raise ValueError(f"the record of iteration {record.iteration} holds no ratios: a run with n = 1")
        counts = np.sum(histograms, axis=0)
        rows[record.iteration] = counts / max(counts.sum(), 1)
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("iteration")
    return frame.set_axis([i / frame.shape[1] for i in range(frame.shape[1])], axis=1)


def trained_on(records: pd.DataFrame) -> str:
    """The column of the loss that is trained on: the output's where all records have it, else the blocks'."""
    return "output_loss" if "output_loss" in records and records["output_loss"].notna().all() else "loss"


def loss_curves(records: pd.DataFrame, title: str | None = None, smooth: int = 20) -> Figure:
    """Losses and frozen share against the iteration, faint as measured and strong as a moving mean over `smooth` iterations.

    Columns: iteration, loss or output_loss, and where there are such: ratio_loss, frozen. A column `run` gives one line per
    run. Of the two losses that is drawn which is trained on.
    """
    loss = trained_on(records)
    return curves(records, {loss: LOSSES[loss], "ratio_loss": "ratio loss", "frozen": "frozen share"}, title, smooth)


def ratio_curves(records: pd.DataFrame, title: str | None = None) -> Figure:
    """How decided the ratios are against the iteration: mean entropy, frozen share, share whose winner is not the first.

    Columns as in `records_frame`; a column `run` gives one line per run.
    """
    return curves(records, RATIO_PANELS, title, smooth=1)


def curves(records: pd.DataFrame, labels: Mapping[str, str], title: str | None, smooth: int) -> Figure:
    """A panel for each of the columns `labels` in which there is anything, a line per `run`."""
    panels = [(c, label) for c, label in labels.items() if c in records and records[c].abs().sum() > 0]
    if not panels:
        raise ValueError(f"columns {list(records.columns)} hold none of {list(labels)}")
    width = page_width()
    wide = width >= 5 and len(panels) > 1
    figure = new_figure(0.28 * width + 0.5 if wide else (0.23 * width + 0.12) * len(panels) + 0.4)
    axes = np.ravel(figure.subplots(*((1, len(panels)) if wide else (len(panels), 1)), sharex=True, squeeze=False))
    runs = by_run(records)
    colors = run_colors([name for name, _ in runs])
    for axis, (column, label) in zip(axes, panels, strict=True):
        for (name, run), color in zip(runs, colors, strict=True):
            _curve(axis, run["iteration"], run[column], name, color, smooth)
        axis.set_ylabel(label)
        if column in LOSSES:
            log_scale(axis, "y")
        elif column in ("frozen", "moved"):
            axis.set_ylim(-0.02, 1.02)  # lines at 0 and at 1 are seen whole
    for axis in axes if wide else axes[-1:]:
        axis.set_xlabel("iteration")
    if not wide:
        figure.align_ylabels()
    return legended(figure, title, axes[0]) if len(runs) > 1 else headed(figure, title)


def _curve(axis, x: pd.Series, y: pd.Series, name: str, color: str, smooth: int) -> None:
    """A line, and with `smooth` > 1 the measured values faintly behind their moving mean."""
    if smooth > 1:
        axis.plot(x, y, color=color, alpha=0.25, linewidth=0.6)
    axis.plot(x, y.rolling(smooth, min_periods=1, center=True).mean(), color=color, label=name)


def block_losses(records: pd.DataFrame, title: str | None = None, window: int = 20) -> Figure:
    """Block loss L_d of every block: at the start dashed, at the end solid, each the mean of `window` records.

    Columns as in `records_frame`; a column `run` gives one pair of lines per run.
    """
    columns = [c for c in records if c.startswith("block_")]
    if not columns:
        raise ValueError(f"columns {list(records.columns)} hold no block losses")
    figure, axis = panel(0.45, 0.2)
    runs = by_run(records)
    for (name, run), color in zip(runs, run_colors([name for name, _ in runs]), strict=True):
        marker = method_marker(name)
        for part, look, label in ((run.head(window), "--", None), (run.tail(window), "-", name)):
            losses = part[columns].mean().to_numpy()
            axis.plot(range(len(losses)), losses, look, color=color, marker=marker, label=label)
    for look, label in (("--", f"first {window} iterations"), ("-", f"last {window} iterations")):
        axis.plot([], [], look, color=METHOD_COLORS["full precision"], label=label)
    axis.set(xlabel="block", ylabel="block loss")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=14))
    log_scale(axis, "y")
    return legended(figure, title, axis)


def heat_map(axis, histograms: pd.DataFrame):
    """Rows of `ratio_histograms` as colors over iterations and largest ratios; returns the mesh, for `color_bar`."""
    shares, at = histograms.to_numpy(dtype=float), histograms.index.to_numpy(dtype=float)
    edges = np.append(at, at[-1] + (at[-1] - at[-2] if len(at) > 1 else 1)) - 0.5
    shown = np.ma.masked_less_equal(shares.T, 0)  # [iterations, bins] -> [bins, iterations]
    colors = {"cmap": "viridis", "norm": LogNorm(max(shown.min(), 1e-5), 1.0), "rasterized": True}
    return axis.pcolormesh(edges, np.linspace(0, 1, shares.shape[1] + 1), shown, **colors)


def ratio_heatmap(histograms: pd.DataFrame, title: str | None = None, freeze_above: float | None = 0.99) -> Figure:
    """Where the largest ratios of all sub-vectors are, iteration by iteration: rows of `ratio_histograms` as a heat map."""
    if histograms.size == 0 or not (histograms > 0).any(axis=None):
        raise ValueError(f"histograms of shape {histograms.shape} hold no counts")
    figure, axis = panel(0.55)
    mesh = heat_map(axis, histograms)
    if freeze_above is not None:
        color, place = METHOD_COLORS["GPTVQ-like"], ("axes fraction", "data")
        axis.axhline(freeze_above, color=color, linewidth=0.8, linestyle="--")
        look = {"color": color, "annotation_clip": False}
        note(axis, f"frozen above {freeze_above:g}", (0.01, freeze_above), (0, 2), place, **look)
    axis.set(xlabel="iteration", ylabel="largest ratio", ylim=(0, 1))
    color_bar(axis, mesh, "share of sub-vectors")
    if title:
        axis.set_title(title, pad=12 if freeze_above is not None else 4)
    return figure
