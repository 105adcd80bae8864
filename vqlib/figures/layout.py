"""What figures share: one panel or several, plain numbers on log axes, a title and a legend that cannot collide."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from vqlib.figures.styles import new_figure


def page_width() -> float:
    """Inches, of the current style; from 5 on, panels stand side by side."""
    return mpl.rcParams["figure.figsize"][0]


def panel(share: float, extra: float = 0.0) -> tuple[Figure, Axes]:
    """A figure of one panel, `share` of its width and `extra` inches high."""
    figure = new_figure(share * page_width() + extra)
    return figure, figure.subplots()


def by_run(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The parts of a column `run`; without one, a single run in VQ4DiT's color."""
    return [(str(n), run) for n, run in frame.groupby("run", sort=False)] if "run" in frame else [("VQ4DiT", frame)]


def log_scale(axis: Axes, *sides: str) -> None:
    """Log axes with plain figures, of what is drawn already."""
    for side in sides:
        axis.set(**{f"{side}scale": "log"})
        plain_log_ticks(getattr(axis, f"{side}axis"))


def plain_log_ticks(side) -> None:
    """Plain figures on a log axis: powers of ten; below two decades 1, 2, 5 × 10ⁿ, below a factor of 4 tenths of them, too."""
    low, high = side.get_view_interval()
    subs = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high < 4 * low else (1, 2, 5) if high < 100 * low else (1,)
    side.set_major_locator(LogLocator(subs=subs))
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    side.set_minor_formatter(NullFormatter())


def note(axis: Axes, text: str, place: tuple, shift: tuple[float, float], coords="data", **look) -> None:
    """Small text `shift` points beside a place."""
    look = {"fontsize": mpl.rcParams["legend.fontsize"]} | look
    axis.annotate(text, place, xycoords=coords, xytext=shift, textcoords="offset points", **look)


def color_bar(axis: Axes, mesh, label: str) -> None:
    """A bar for the colors of a map, which has no grid of its own."""
    axis.grid(False)
    bar = axis.figure.colorbar(mesh, ax=axis, pad=0.02, aspect=25)
    bar.set_label(label)
    bar.outline.set_visible(False)


def legended(figure: Figure, title: str | None, axis: Axes) -> Figure:
    """`headed` with the legend of what `axis` shows."""
    return headed(figure, title, *axis.get_legend_handles_labels())


def headed(figure: Figure, title: str | None, handles: Sequence = (), labels: Sequence[str] = ()) -> Figure:
    """Title and legend above everything; the title is the legend's own where both are there, so they cannot collide."""
    if not handles:
        if title:
            figure.suptitle(title)
        return figure
    columns = _columns(list(labels), 72 * figure.get_figwidth())
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns, title=title, borderpad=0.1)
    legend.get_title().set_fontsize(mpl.rcParams["figure.titlesize"])
    return figure


def _columns(labels: list[str], width: float) -> int:
    """How many of the longest labels fit side by side in `width` points, with their handles; at least one."""
    size = FontProperties(size=mpl.rcParams["legend.fontsize"]).get_size_in_points()
    handle = mpl.rcParams["legend.handlelength"] + mpl.rcParams["legend.columnspacing"] + 0.8
    needed = 0.0
    for count, length in enumerate(sorted(map(len, labels), reverse=True)):
        needed += (0.53 * length + handle) * size  # the mean width of a letter, in em
        if needed > width:
            return max(count, 1)
    return len(labels)
