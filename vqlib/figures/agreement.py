"""The paper's Fig. 3 and Fig. 4: do gradients that share a codeword agree, and which candidate is chosen."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vqlib.figures.layers import kinds_in_order, layer_place
from vqlib.figures.layout import by_run, headed, legended, note, page_width, panel
from vqlib.figures.styles import method_color, method_marker, new_figure, run_colors

CHANCE = "chance"  # the stage in which assignments are shuffled
CHANCE_COLOR = "#777777"


def agreement_plot(agreement: pd.DataFrame, title: str | None = None) -> Figure:
    """Fig. 3: columns stage, layer, members, cosine (of `diagnostics.agreement_frame`); one row per codeword.

    Left: share of sub-vectors whose codeword's mean cosine is at most x. Right: the mean of each kind of layer.
    """
    kinds = agreement["layer"].map(lambda name: layer_place(name)[1])
    shown, width = kinds_in_order(kinds), page_width()
    figure = new_figure(0.4 * width + 0.3 if width >= 5 else 1.15 * width)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15)) if width >= 5 else figure.subplots(2, 1)
    for stage, part in agreement.groupby("stage", sort=False):
        look = {"color": CHANCE_COLOR, "linestyle": ":"} if stage == CHANCE else {"color": method_color(stage)}
        order = part.sort_values("cosine")
        left.plot(order["cosine"], order["members"].cumsum() / order["members"].sum(), label=stage, **look)
        sums = part.assign(cosine=part["cosine"] * part["members"]).groupby(kinds)[["cosine", "members"]].sum()
        marker = "_" if stage == CHANCE else method_marker(stage)
        means = (sums["cosine"] / sums["members"]).reindex(shown)
        right.plot(range(len(shown)), means, marker=marker, linewidth=0.6, **look)
    low, high = np.quantile(agreement["cosine"], (0.005, 0.995))
    left.axvline(0, color="#BBBBBB", linewidth=0.6, zorder=0)
    left.set(xlabel="mean cosine within a codeword", ylabel="share of sub-vectors", xlim=(low, high), ylim=(0, 1))
    right.axhline(0, color="#BBBBBB", linewidth=0.6, zorder=0)
    right.set_xticks(range(len(shown)), shown)
    right.set_ylabel("mean cosine")
    right.grid(False, axis="x")
    return legended(figure, title, left)


def winner_plot(positions: pd.DataFrame, title: str | None = None) -> Figure:
    """Fig. 4: columns position and count, a row per layer or for all; a column `run` gives a bar per position and run.

    The bars are shares of all the counts of a run. The dotted line is 1/n, a choice made blindly.
    """
    runs, n = by_run(positions), int(positions["position"].max())
    figure, axis = panel(0.5)
    for i, ((name, run), color) in enumerate(zip(runs, run_colors([name for name, _ in runs]), strict=True)):
        counts = run.groupby("position")["count"].sum().reindex(range(1, n + 1), fill_value=0)
        place = np.arange(1, n + 1) + (i - (len(runs) - 1) / 2) * 0.8 / len(runs)
        bars = axis.bar(place, counts / counts.sum(), 0.74 / len(runs), color=color, label=name)
        axis.bar_label(bars, fmt=lambda share: f"{share:.1%}", label_type="center", color="white")
    _chance_line(axis, 1 / n)
    axis.set_xticks(range(1, n + 1), ["first", *(f"{i}." for i in range(2, n + 1))])
    axis.set(xlabel="position of the chosen candidate", ylabel="share of sub-vectors")
    axis.margins(y=0.15)
    axis.grid(False, axis="x")
    return legended(figure, title, axis) if len(runs) > 1 else headed(figure, title)


def choice_by_distance(choices: pd.DataFrame, title: str | None = None, chance: float | None = None) -> Figure:
    """How often a candidate wins against how much farther it is than the nearest one.

    Columns relative_distance (≥ 1), share, count; a column `run` gives one line per run. Areas grow with the count.
    `chance` is the share a blind choice gives, 1/n.
    """
    figure, axis = panel(0.5)
    runs = by_run(choices)
    for (name, run), color in zip(runs, run_colors([name for name, _ in runs]), strict=True):
        axis.plot(run["relative_distance"], run["share"], color=color, linewidth=0.9, label=name)
        axis.scatter(run["relative_distance"], run["share"], s=60 * run["count"] / run["count"].max(), color=color)
    axis.set(xlabel="distance of the candidate / distance of the nearest", ylabel="share chosen")
    axis.set_ylim(0, 1.2 * max(choices["share"].max(), chance or 0.0))
    if chance is not None:
        _chance_line(axis, chance, below=True)
    return legended(figure, title, axis) if len(runs) > 1 else headed(figure, title)


def _chance_line(axis, share: float, below: bool = False) -> None:
    axis.axhline(share, color=CHANCE_COLOR, linewidth=0.8, linestyle=":")
    look = {"ha": "right", "va": "top" if below else "bottom", "color": CHANCE_COLOR}
    note(axis, f"blind choice {share:.3g}", (1, share), (-2, -8 if below else 3), ("axes fraction", "data"), **look)
