"""What figures of several panels share: plain numbers on log axes, a title and a legend that cannot collide."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure
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
    columns = min(len(handles), 3 if figure.get_figwidth() < 5 else 6)
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns, title=title, borderpad=0.1)
    legend.get_title().set_fontsize(mpl.rcParams["figure.titlesize"])
    return figure
