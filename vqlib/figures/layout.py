"""What figures of several panels share: plain numbers on log axes, a title and a legend that cannot collide."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter


def plain_log_ticks(side) -> None:
    """Plain figures on a log axis: 1, 2, 5 × 10ⁿ below two decades, where powers of ten would be too few."""
    low, high = side.get_view_interval()
    side.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    side.set_minor_formatter(NullFormatter())


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
