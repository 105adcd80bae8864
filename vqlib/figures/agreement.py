"""The paper's Fig. 3 and Fig. 4: do gradients that share a codeword agree, and which candidate is chosen."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vqlib.figures.layers import KINDS, layer_place
from vqlib.figures.layout import headed
from vqlib.figures.styles import method_color, method_marker, new_figure

CHANCE = "chance"  # the stage in which assignments are shuffled
CHANCE_COLOR = "#777777"


def agreement_plot(agreement: pd.DataFrame, title: str | None = None) -> Figure:
    """Fig. 3: columns stage, layer, members, cosine (of `diagnostics.agreement_frame`); one row per codeword.

    Left: share of sub-vectors whose codeword's mean cosine is at most x. Right: the mean of each kind of layer.
    """
    stages = list(agreement["stage"].unique())
    kinds = agreement["layer"].map(lambda name: layer_place(name)[1])
    shown = [kind for kind in KINDS.values() if kind in set(kinds)] or sorted(kinds.unique())
    width = mpl.rcParams["figure.figsize"][0]
    figure = new_figure(0.4 * width + 0.3 if width >= 5 else 1.15 * width)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15)) if width >= 5 else figure.subplots(2, 1)
    for stage in stages:
        part, color = agreement[agreement["stage"] == stage], _color(stage)
        look = {"linestyle": ":"} if stage == CHANCE else {}
        order = part.sort_values("cosine")
        left.plot(order["cosine"], order["members"].cumsum() / order["members"].sum(), color=color, label=stage, **look)
        means = [_mean(part[kinds[part.index] == kind]) for kind in shown]
        marker = "_" if stage == CHANCE else method_marker(stage)
        right.plot(range(len(shown)), means, color=color, marker=marker, linewidth=0.6, **look)
    low, high = np.quantile(agreement["cosine"], (0.005, 0.995))
    left.axvline(0, color="#BBBBBB", linewidth=0.6, zorder=0)
    left.set(xlabel="mean cosine within a codeword", ylabel="share of sub-vectors", xlim=(low, high), ylim=(0, 1))
    right.axhline(0, color="#BBBBBB", linewidth=0.6, zorder=0)
    right.set_xticks(range(len(shown)), shown)
    right.set_ylabel("mean cosine")
    right.grid(False, axis="x")
    return headed(figure, title, *left.get_legend_handles_labels())


def winner_plot(positions: pd.DataFrame, title: str | None = None) -> Figure:
    """Fig. 4: columns position, share, and where runs or layers are compared: run, count. One bar per position and run.

    Shares of several layers are averaged by their `count`. The dotted line is 1/n, a choice made blindly.
    """
    runs = list(positions.groupby("run", sort=False)) if "run" in positions else [("VQ4DiT", positions)]
    figure = new_figure(0.5 * mpl.rcParams["figure.figsize"][0])
    axis = figure.subplots()
    n = int(positions["position"].max())
    for i, (name, run) in enumerate(runs):
        counts = run.groupby("position")["count"].sum().reindex(range(1, n + 1), fill_value=0)
        shares = counts / counts.sum()
        place = np.arange(1, n + 1) + (i - (len(runs) - 1) / 2) * 0.8 / len(runs)
        bars = axis.bar(place, shares, width=0.74 / len(runs), color=_run_color(str(name), i), label=str(name))
        axis.bar_label(bars, fmt=lambda share: f"{share:.1%}", label_type="center", color="white")
    _chance_line(axis, 1 / n)
    axis.set_xticks(range(1, n + 1), ["first", *(f"{i}." for i in range(2, n + 1))])
    axis.set(xlabel="position of the chosen candidate", ylabel="share of sub-vectors")
    axis.margins(y=0.15)
    axis.grid(False, axis="x")
    return headed(figure, title, *axis.get_legend_handles_labels() if len(runs) > 1 else ([], []))


def choice_by_distance(choices: pd.DataFrame, title: str | None = None, chance: float | None = None) -> Figure:
    """How often a candidate wins against how much farther it is than the nearest one.

    Columns relative_distance (≥ 1), share, count; a column `run` gives one line per run. Areas grow with the count.
    `chance` is the share a blind choice gives, 1/n.
    """
    figure = new_figure(0.5 * mpl.rcParams["figure.figsize"][0])
    axis = figure.subplots()
    runs = list(choices.groupby("run", sort=False)) if "run" in choices else [("VQ4DiT", choices)]
    for i, (name, run) in enumerate(runs):
        color = _run_color(str(name), i)
        axis.plot(run["relative_distance"], run["share"], color=color, linewidth=0.9, label=str(name))
        axis.scatter(run["relative_distance"], run["share"], s=60 * run["count"] / run["count"].max(), color=color)
    axis.set(xlabel="distance of the candidate / distance of the nearest", ylabel="share chosen")
    axis.set_ylim(0, 1.2 * max(choices["share"].max(), chance or 0.0))
    if chance is not None:
        _chance_line(axis, chance, below=True)
    return headed(figure, title, *axis.get_legend_handles_labels() if len(runs) > 1 else ([], []))


def _chance_line(axis, share: float, below: bool = False) -> None:
    axis.axhline(share, color=CHANCE_COLOR, linewidth=0.8, linestyle=":")
    axis.annotate(
        f"blind choice {share:.3g}",
        (1, share),
        xycoords=("axes fraction", "data"),
        xytext=(-2, -8 if below else 3),
        textcoords="offset points",
        ha="right",
        va="top" if below else "bottom",
        color=CHANCE_COLOR,
        fontsize=mpl.rcParams["legend.fontsize"],
    )


def _mean(part: pd.DataFrame) -> float:
    return float(np.average(part["cosine"], weights=part["members"])) if len(part) else float("nan")


def _color(stage: str) -> str:
    return CHANCE_COLOR if stage == CHANCE else method_color(stage)


def _run_color(name: str, place: int) -> str:
    """A method's own color; the runs of one method after the first in lighter shades of it."""
    base = np.array(mpl.colors.to_rgb(method_color(name)))
    return mpl.colors.to_hex(base + (1 - base) * 0.3 * (place % 3))
