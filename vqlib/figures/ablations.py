"""Ablations: one group of settings a panel, one dot a seed, the mean and its spread where there are several seeds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vqlib.figures.layout import legended, log_scale, page_width
from vqlib.figures.styles import method_color, method_key, new_figure


def ablation_plot(
    rows: pd.DataFrame,
    title: str | None = None,
    label: str = "FD",
    references: Mapping[str, float] | None = None,
) -> Figure:
    """One row of panels per group: columns group, setting, seed and fd; settings stand in their order of appearance.

    Dots are seeds; bars span mean ± one standard deviation. `references` (method -> value) are horizontal dotted lines.
    """
    groups = list(rows.dropna(subset=["fd"]).groupby("group", sort=False))
    if not groups:
        raise ValueError("no row has a value in column 'fd'")
    width = page_width()
    columns = min(len(groups), 3 if width >= 5 else 2)
    lines = -(-len(groups) // columns)
    figure = new_figure(lines * (0.22 * width + 0.55 if width >= 5 else 0.55 * width) + 0.3)
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axis, (name, group) in zip(axes.flat, groups, strict=False):
        _panel(axis, str(name), group, references or {})
    for axis in list(axes.flat)[len(groups) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel(label)
    return legended(figure, title, axes.flat[0])


def _panel(axis, name: str, group: pd.DataFrame, references: Mapping[str, float]) -> None:
    settings = list(group["setting"].unique())
    for method, value in references.items():
        axis.axhline(value, color=method_color(method), linewidth=0.9, linestyle=":", label=method, zorder=1)
    for place, setting in enumerate(settings):
        values = group.loc[group["setting"] == setting, "fd"].to_numpy(dtype=float)
        color = method_color(setting if method_key(setting) else "VQ4DiT")
        axis.scatter(np.full(len(values), place), values, s=9, color=color, linewidths=0, alpha=0.7, zorder=3)
        if len(values) > 1:
            spread = values.std(ddof=1)
            axis.errorbar(place, values.mean(), yerr=spread, color=color, marker="_", markersize=9, capsize=2, zorder=2)
    log_scale(axis, "y")
    axis.set_xticks(range(len(settings)), settings)
    axis.set(xlim=(-0.6, len(settings) - 0.4), title=name)
    axis.grid(False, axis="x")
    if max(len(str(s)) for s in settings) * len(settings) > 24:
        for label in axis.get_xticklabels():
            label.set(rotation=35, ha="right", rotation_mode="anchor")
