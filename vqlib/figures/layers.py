"""The error of every quantized layer: a map of blocks and kinds, or one dot per block and method."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vqlib.figures.layout import color_bar, headed, legended, log_scale, panel
from vqlib.figures.styles import method_looks

KINDS = {  # a DiT's layers by their names within a block -> short labels, in the order of the forward pass
    "norm1.linear": "adaLN",
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.to_out.0": "out",
    "ff.net.0.proj": "MLP 1",
    "ff.net.2": "MLP 2",
}
NUMBERED = re.compile(r"(\w+)\.(\d+)(?:\.(.+))?")  # list of blocks, number, name within the block


def layer_place(name: str) -> tuple[int, str]:
    """(block, kind) of a quantized layer's name: 'transformer_blocks.3.attn1.to_q' -> (3, 'q').

    Layers that a DiT has not have the name within their block as kind, and what FLUX calls its second list of blocks before
    it: 'single_transformer_blocks.7.proj_mlp' -> (7, 'single proj_mlp'). A name without a number counts as of block 0.
    """
    found = NUMBERED.search(name)
    blocks, number, within = found.groups(default=name) if found else ("", "0", name)
    second = blocks.removesuffix("_transformer_blocks") if blocks.endswith("_transformer_blocks") else ""
    return int(number), " ".join(part for part in (second, KINDS.get(within, within)) if part)


def kinds_in_order(kinds: Iterable[str]) -> list[str]:
    """Each kind once, those of `KINDS` in their order and first."""
    there = dict.fromkeys(kinds)
    return [*(kind for kind in KINDS.values() if kind in there), *(k for k in there if k not in KINDS.values())]


def error_by_layer(errors: pd.DataFrame, title: str | None = None, label: str = "relative error") -> Figure:
    """Columns layer, error, and method to compare methods. One method: heat map of blocks and kinds; several: dots."""
    places = [layer_place(name) for name in errors["layer"]]
    table = errors.assign(block=[block for block, _ in places], kind=[kind for _, kind in places])
    draw = _error_dots if "method" in table and table["method"].nunique() > 1 else _error_map
    return draw(table, kinds_in_order(table["kind"]), label, title)


def _error_map(table: pd.DataFrame, kinds: list[str], label: str, title: str | None) -> Figure:
    blocks = range(table["block"].min(), table["block"].max() + 1)  # those between that have no error stay white
    grid = table.pivot(index="kind", columns="block", values="error").reindex(index=kinds, columns=blocks)
    figure, axis = panel(0.45, 0.2)
    edges = np.arange(blocks.start, blocks.stop + 1) - 0.5, np.arange(len(kinds) + 1) - 0.5
    mesh = axis.pcolormesh(*edges, grid.to_numpy(), cmap="viridis")
    axis.set_yticks(range(len(kinds)), kinds)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=14))
    axis.invert_yaxis()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("block")
    color_bar(axis, mesh, label)
    return headed(figure, title)


def _error_dots(table: pd.DataFrame, kinds: list[str], label: str, title: str | None) -> Figure:
    """Per kind and method one dot per block, and a bar at their median."""
    methods = method_looks(table["method"].unique())
    figure, axis = panel(0.58, 0.2)
    for i, (method, (color, marker)) in enumerate(methods.items()):
        shift = (i - (len(methods) - 1) / 2) * 0.8 / len(methods)
        dots = {"s": 20, "color": color, "alpha": 0.7, "linewidths": 0, "marker": marker, "zorder": 3}
        for x, kind in enumerate(kinds):
            values = table.loc[(table["method"] == method) & (table["kind"] == kind), "error"]
            axis.scatter([x + shift] * len(values), values, label=method if x == 0 else None, **dots)
            if len(values):
                ends = x + shift - 0.32 / len(methods), x + shift + 0.32 / len(methods)
                axis.hlines(values.median(), *ends, color=color, linewidth=1.4, zorder=2)
    log_scale(axis, "y")
    axis.set_xticks(range(len(kinds)), kinds)
    axis.grid(False, axis="x")
    axis.set_ylabel(label)
    return legended(figure, title, axis)
