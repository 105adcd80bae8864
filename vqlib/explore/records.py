"""Finished runs, step by step: where the ratios are and which candidate wins; two runs over each other."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vqlib.calibrator.runs import differences, read_records, read_settings
from vqlib.explore.view import Control, Picture, Settings, View
from vqlib.figures import KINDS, layer_place, ratio_histograms, records_frame
from vqlib.figures.layout import headed, plain_log_ticks
from vqlib.figures.records import heat_map
from vqlib.figures.styles import METHOD_COLORS, method_color, new_figure

ALL = "all layers"
POSITIONS = 100  # of the step slider, about
SMOOTH = (1, 5, 10, 20, 50, 100)
KIND_COLORS = dict(zip(KINDS.values(), mpl.colormaps["viridis"](np.linspace(0, 0.92, len(KINDS))), strict=True))
PAIR = (METHOD_COLORS["VQ4DiT"], METHOD_COLORS["GPTVQ-like"])  # where two runs are of one method
PANELS = {"loss": "block loss", "frozen": "frozen share", "moved": "winner not first"}


class RatioView(View):
    """A slider over the steps of a run folder: largest ratios as heat map and histogram, and where winners change.

    Raises ValueError where the run has no records or nothing to choose (n = 1).
    """

    name = "ratios"

    def __init__(self, run: str | Path, out: str | Path = "figures") -> None:
        self.records = read_records(run)
        if not self.records:
            raise ValueError(f"{run} holds no records yet")
        self.histograms = {ALL: ratio_histograms(self.records)}
        layers = self.records[0].layers
        rows = [{n: entry["moved"] for n, entry in record.layers.items()} for record in self.records]
        self.moved = pd.DataFrame(rows, index=self.histograms[ALL].index)
        every, last = max(1, len(rows) // POSITIONS), int(self.moved.index[-1])
        known = [int(step) for step in self.moved.index]
        steps = tuple(step for step in known if step % every == 0 or step in (known[0], last))
        controls = [
            Control("step", "step", steps, last),
            Control("layer", "layer", (ALL, *layers), ALL, ordered=False),
        ]
        super().__init__(controls, out)

    def picture(self, settings: Settings, prepared: Any) -> Picture:
        """Everything at one step; the data of an export are the histograms of all steps."""
        step, layer = settings["step"], settings["layer"]
        if layer not in self.histograms:
            self.histograms[layer] = ratio_histograms(self.records, layer)
        histograms = self.histograms[layer]
        moved = self._moved(layer)
        frozen = histograms.loc[step].iloc[-1]
        title = f"Step {step}, {layer}: {moved.loc[step].mean():.0%} of the winners are not the first candidate"
        caption = f"{title} · {frozen:.1%} of the largest ratios are above {histograms.columns[-1]:g}"
        return Picture(partial(_draw_ratios, histograms, moved, step, title), caption, histograms.reset_index())

    def _moved(self, layer: str) -> pd.DataFrame:
        """Share of sub-vectors whose winner is not the first candidate, a column per kind of layer or of one."""
        if layer != ALL:
            return self.moved[[layer]]
        return self.moved.T.groupby([layer_place(name)[1] for name in self.moved], sort=False).mean().T


def _draw_ratios(histograms: pd.DataFrame, moved: pd.DataFrame, step: int, title: str, titled: bool) -> Figure:
    width = mpl.rcParams["figure.figsize"][0]
    wide = width >= 5
    figure = new_figure(0.4 * width if wide else 1.3 * width)
    shape = {"ncols": 3, "width_ratios": (1.3, 1, 1)} if wide else {"nrows": 3}
    heat, bars, winners = figure.subplots(**shape)
    edges = np.linspace(0, 1, histograms.shape[1] + 1)
    heat_map(heat, histograms)
    bars.barh(edges[:-1], histograms.loc[step], height=np.diff(edges), align="edge", color=METHOD_COLORS["VQ4DiT"])
    for kind in moved:
        color = KIND_COLORS.get(kind, METHOD_COLORS["VQ4DiT"])
        winners.plot(moved.index, moved[kind], color=color, label=kind if len(moved.columns) > 1 else None)
    for axis in (heat, winners):
        axis.axvline(step, color=METHOD_COLORS["GPTVQ-like"], linewidth=1)
        axis.set_xlabel("step")
    heat.grid(False)
    heat.set(ylabel="largest ratio", ylim=(0, 1))
    bars.set(xlabel="share of sub-vectors", ylim=(0, 1), ylabel="" if wide else "largest ratio")
    winners.set_ylabel("winner not first")
    handles, labels = winners.get_legend_handles_labels()
    if not handles:
        return headed(figure, title if titled else None)
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=7 if wide else 4, borderpad=0.1)
    legend.set_title(title if titled else None, {"size": mpl.rcParams["figure.titlesize"]})
    return figure


class CompareView(View):
    """Losses, frozen share and winners of two run folders over each other, and the settings in which they differ."""

    name = "compare"

    def __init__(self, run_a: str | Path, run_b: str | Path, out: str | Path = "figures") -> None:
        run_a, run_b = Path(run_a), Path(run_b)
        names = _names(run_a, run_b)
        self.frames = {n: records_frame(read_records(run)) for n, run in zip(names, (run_a, run_b), strict=True)}
        for run, frame in zip((run_a, run_b), self.frames.values(), strict=True):
            if frame.empty:
                raise ValueError(f"{run} holds no records yet")
        found = differences(*(read_settings(run / "run.json") for run in (run_a, run_b)))
        self.differences = {key.rpartition(".")[2]: values for key, *values in found}
        super().__init__([Control("smooth", "smooth", SMOOTH, 20, tip="steps of the moving mean")], out)

    def picture(self, settings: Settings, prepared: Any) -> Picture:
        """The lines; the table holds both ends and the settings that differ."""
        smooth = settings["smooth"]
        tails = [frame.tail(smooth).mean() for frame in self.frames.values()]
        rows = [
            {
                "run": name,
                "steps": len(frame),
                "block loss": tail["loss"],
                "frozen": tail["frozen"],
                "winner not first": tail["moved"],
                "minutes": frame["seconds"].sum() / 60,
                **{key: values[i] for key, values in self.differences.items()},
            }
            for i, ((name, frame), tail) in enumerate(zip(self.frames.items(), tails, strict=True))
        ]
        losses = " against ".join(f"{row['block loss']:.4g} ({row['run']})" for row in rows)
        differ = ", ".join(f"{key} {a} / {b}" for key, (a, b) in self.differences.items()) or "no setting differs"
        caption = f"block loss at the end {losses}, mean of the last {smooth} steps · {differ}"
        data = pd.concat([frame.assign(run=name) for name, frame in self.frames.items()], ignore_index=True)
        return Picture(partial(_draw_pair, self.frames, smooth), caption, data, pd.DataFrame(rows))


def _draw_pair(frames: Mapping[str, pd.DataFrame], smooth: int, titled: bool) -> Figure:
    width = mpl.rcParams["figure.figsize"][0]
    wide = width >= 5
    figure = new_figure(0.28 * width + 0.5 if wide else 0.7 * width + 0.8)
    axes = figure.subplots(*((1, 3) if wide else (3, 1)), sharex=True)
    own = [method_color(name) for name in frames]
    colors = own if len(set(own)) == len(own) else PAIR
    for axis, (column, label) in zip(axes, PANELS.items(), strict=True):
        for (name, frame), color in zip(frames.items(), colors, strict=True):
            axis.plot(frame["iteration"], frame[column], color=color, alpha=0.2, linewidth=0.6)
            mean = frame[column].rolling(smooth, min_periods=1, center=True).mean()
            axis.plot(frame["iteration"], mean, color=color, label=name)
        axis.set_ylabel(label)
        if column == "loss":
            axis.set_yscale("log")
            plain_log_ticks(axis.yaxis)
        else:
            axis.set_ylim(-0.02, 1.02)  # lines at 0 and at 1 are seen whole
    for axis in axes if wide else axes[-1:]:
        axis.set_xlabel("step")
    title = "Two runs, step by step" if titled else None
    return headed(figure, title, *axes[0].get_legend_handles_labels())


def _names(run_a: Path, run_b: Path) -> tuple[str, str]:
    """The last part of each path in which the two differ."""
    pairs = zip(reversed(run_a.resolve().parts), reversed(run_b.resolve().parts), strict=False)
    return next(((a, b) for a, b in pairs if a != b), (f"{run_a.name}, first", f"{run_b.name}, second"))
