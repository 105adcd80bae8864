"""Finished runs, step by step: where the ratios are and which candidate wins; two runs over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from vqlib.figures.layout import headed, page_width
from vqlib.figures.records import LOSSES, curves, heat_map, trained_on
from vqlib.figures.styles import METHOD_COLORS, new_figure

ALL = "all layers"
POSITIONS = 100  # of the step slider, about
SMOOTH = (1, 5, 10, 20, 50, 100)
KIND_COLORS = dict(zip(KINDS.values(), mpl.colormaps["viridis"](np.linspace(0, 0.92, len(KINDS))), strict=True))
SHARES = {"frozen": "frozen share", "moved": "winner not first"}
# Columns of a comparison's table before the settings that differ.
COMPARED = ("run", "iterations", *LOSSES.values(), *SHARES.values(), "minutes")


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
        self.counts = pd.Series({name: entry["count"] for name, entry in layers.items()})
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
        self.subject = run_name(Path(run).expanduser())

    def picture(self, settings: Settings, prepared: Any) -> Picture:
        """Everything at one step; the data of an export are the histograms of all steps."""
        step, layer = settings["step"], settings["layer"]
        if layer not in self.histograms:
            self.histograms[layer] = ratio_histograms(self.records, layer)
        histograms = self.histograms[layer]
        chosen = list(self.counts.index) if layer == ALL else [layer]
        moved = self._moved(chosen)
        frozen = histograms.loc[step].iloc[-1]
        share = np.average(self.moved.loc[step, chosen], weights=self.counts[chosen])
        title = f"Step {step}, {layer}: {share:.0%} of the winners are not the first candidate"
        caption = f"{title} · {frozen:.1%} of the largest ratios are above {histograms.columns[-1]:g}"
        return Picture(partial(_draw_ratios, histograms, moved, step, title), caption, histograms.reset_index())

    def _moved(self, chosen: list[str]) -> pd.DataFrame:
        """Share of sub-vectors whose winner is not the first candidate, a column per kind of layer."""
        kinds = [layer_place(name)[1] for name in chosen]
        moved = (self.moved[chosen] * self.counts[chosen]).T.groupby(kinds, sort=False).sum().T
        return moved / self.counts[chosen].groupby(kinds, sort=False).sum()


def _draw_ratios(histograms: pd.DataFrame, moved: pd.DataFrame, step: int, title: str, titled: bool) -> Figure:
    width = page_width()
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
        run_a, run_b = Path(run_a).expanduser(), Path(run_b).expanduser()
        names = _names(run_a, run_b)
        self.frames = {n: records_frame(read_records(run)) for n, run in zip(names, (run_a, run_b), strict=True)}
        for run, frame in zip((run_a, run_b), self.frames.values(), strict=True):
            if frame.empty:
                raise ValueError(f"{run} holds no records yet")
        self.data = pd.concat([frame.assign(run=name) for name, frame in self.frames.items()], ignore_index=True)
        found = {key: values for key, *values in differences(*(read_settings(r / "run.json") for r in (run_a, run_b)))}
        self.differences = {label: found[key] for key, label in _labels(list(found), COMPARED).items()}
        super().__init__([Control("smooth", "smooth", SMOOTH, 20, tip="steps of the moving mean")], out)
        self.subject = f"{run_name(run_a)}_{run_name(run_b)}"

    def picture(self, settings: Settings, prepared: Any) -> Picture:
        """The lines; the table holds both ends and the settings that differ."""
        smooth, loss = settings["smooth"], trained_on(self.data)
        tails = [frame.tail(smooth).mean() for frame in self.frames.values()]
        rows = [
            {
                "run": name,
                "iterations": len(frame),
                LOSSES[loss]: tail[loss],
                **{label: tail[column] for column, label in SHARES.items()},
                "minutes": frame["seconds"].sum() / 60,
                **{key: values[i] for key, values in self.differences.items()},
            }
            for i, ((name, frame), tail) in enumerate(zip(self.frames.items(), tails, strict=True))
        ]
        losses = " against ".join(f"{row[LOSSES[loss]]:.4g} ({row['run']})" for row in rows)
        differ = ", ".join(f"{key} {a} / {b}" for key, (a, b) in self.differences.items()) or "no setting differs"
        caption = f"{LOSSES[loss]} at the end {losses}, mean of the last {smooth} steps · {differ}"
        panels = {loss: LOSSES[loss], **SHARES}
        return Picture(partial(_draw_pair, self.data, panels, smooth), caption, self.data, pd.DataFrame(rows))


def run_name(folder: Path) -> str:
    """The last two parts of its path: runs of different models often end alike."""
    return "-".join(folder.resolve().parts[-2:])


def _labels(keys: Sequence[str], taken: Sequence[str]) -> dict[str, str]:
    """The last word of each dotted key, and the whole key where that word is another's or among `taken`."""
    words = [key.rpartition(".")[2] for key in keys]
    alone = {word for word in words if words.count(word) == 1} - set(taken)
    return {key: word if word in alone else key for key, word in zip(keys, words, strict=True)}


def _draw_pair(data: pd.DataFrame, panels: Mapping[str, str], smooth: int, titled: bool) -> Figure:
    return curves(data, panels, "Two runs, step by step" if titled else None, smooth)


def _names(run_a: Path, run_b: Path) -> tuple[str, str]:
    """The last part of each path in which the two differ."""
    pairs = zip(reversed(run_a.resolve().parts), reversed(run_b.resolve().parts), strict=False)
    return next(((a, b) for a, b in pairs if a != b), (f"{run_a.name}, first", f"{run_b.name}, second"))
