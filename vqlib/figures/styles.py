"""How figures look on paper: venues' widths and fonts, one color per method, and the only writer of figures."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.style
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vqlib.system.files import write_bytes


@dataclass(frozen=True)
class Venue:
    """Printed widths in inches and the text size in points that goes with them."""

    column: float
    text: float
    font_size: float
    fonts: tuple[str, ...]


SERIF = ("STIXGeneral", "DejaVu Serif")  # a Times that comes with matplotlib: the same figure on every machine
SANS = ("DejaVu Sans",)

VENUES = {  # from each author kit's \textwidth and \columnsep
    "AAAI": Venue(column=3.3125, text=7.0, font_size=8, fonts=SERIF),  # aaai.sty: 7 in, 0.375 in apart
    "NeurIPS": Venue(column=5.5, text=5.5, font_size=8, fonts=SERIF),  # neurips.sty: 5.5 in, one column
    "ICML": Venue(column=3.25, text=6.75, font_size=8, fonts=SERIF),  # icml.sty: 6.75 in, 0.25 in apart
    "CVPR": Venue(column=3.28125, text=6.875, font_size=8, fonts=SERIF),  # cvpr.sty: 6.875 in, 0.3125 in apart
    "notebook": Venue(column=7.5, text=10.0, font_size=10, fonts=SANS),
}

# Okabe and Ito's color-blind-safe set, with others of Paul Tol's; markers tell methods apart in gray print.
FULL_PRECISION = "full precision"
METHOD_COLORS = {
    FULL_PRECISION: "#333333",
    "k-means": "#E69F00",
    "codebook only": "#56B4E9",
    "VQ4DiT": "#0072B2",
    "VQ4DiT, paper's recipe": "#332288",
    "release": "#009E73",
    "best": "#882255",
    "RTN": "#999999",
    "GPTQ": "#CC79A7",
    "GPTVQ-like": "#D55E00",
    "GPTVQ-like, calibrated": "#661100",
    "additive": "#117733",
    "lattice": "#CC6677",
    "low rank": "#DDCC77",
    "one codebook, a scale a row": "#88CCEE",
    "VQ4DiT, distilled": "#00796B",
}
_MARKERS = ("*", "s", "v", "o", "p", "^", "P", "X", "D", "<", ">", "H", "8", "d", (4, 0, 45), (6, 1, 0))
METHOD_MARKERS = dict(zip(METHOD_COLORS, _MARKERS, strict=True))
ALIASES = {
    "round-to-nearest": "RTN",
    "original": "full precision",
    "fp": "full precision",
    "fp16": "full precision",
    "fp32": "full precision",
    "paper": "VQ4DiT",
    "n = 1": "codebook only",
}
OTHER_COLORS = ("#44AA99", "#AA4499", "#999933", "#6699CC")  # Tol's muted set, for names not listed above
OTHER_MARKERS = ("h", "x", "+", "1")

EMBEDDED = {
    "pdf.fonttype": 42,  # TrueType: searchable text, and accepted by venues that refuse Type 3
    "ps.fonttype": 42,
    "svg.fonttype": "path",  # glyphs as outlines: an SVG that needs no font anywhere
    "svg.hashsalt": "vqlib",  # the same figure gives the same file
    "savefig.bbox": None,  # the exact width asked for, never a trimmed one
}


def method_key(name: str) -> str | None:
    """The entry of METHOD_COLORS that a name such as 'VQ4DiT, n = 3' begins with, as whole words; None where there is none."""
    lower = name.lower()
    table = {**{key.lower(): key for key in METHOD_COLORS}, **ALIASES}
    fits = [prefix for prefix in table if re.match(rf"{re.escape(prefix)}(?!\w)", lower)]
    return table[max(fits, key=len)] if fits else None


def method_color(name: str) -> str:
    """A method's color; a name that is not listed gets one that depends on the name alone."""
    key = method_key(name)
    return METHOD_COLORS[key] if key else OTHER_COLORS[zlib.crc32(name.encode()) % len(OTHER_COLORS)]


def run_colors(names: Sequence[str]) -> list[str]:
    """Each run's method's color; where a run before it has that already, one that is no listed method's."""
    colors: list[str] = []
    for name in names:
        spare = (color for color in OTHER_COLORS if color not in colors)
        own = method_color(name)
        colors.append(next(spare, own) if own in colors else own)
    return colors


def method_marker(name: str) -> str:
    """A method's marker, so that figures can be read without color."""
    return METHOD_MARKERS.get(method_key(name), OTHER_MARKERS[0])


def method_looks(names: Iterable[str]) -> dict[str, tuple]:
    """Color and marker of each method of one figure: names that are not listed differ in one of them, up to sixteen."""
    found: dict[str, tuple] = {}
    for name in names:
        own = method_color(name), method_marker(name)
        if method_key(name) is None and own in found.values():
            spare = ((color, marker) for marker in OTHER_MARKERS for color in OTHER_COLORS)
            own = next((look for look in spare if look not in found.values()), own)
        found[name] = own
    return found


@contextmanager
def style(venue: str = "notebook", columns: int = 1) -> Iterator[Venue]:
    """Figures made inside are as wide as the venue's column (`columns=1`) or text (`columns=2`).

    Names are case-insensitive. Raises ValueError for an unknown venue or a width that does not exist.
    """
    names = {name.lower(): name for name in VENUES}
    if venue.lower() not in names:
        raise ValueError(f"venue {venue!r} is not one of {', '.join(VENUES)}")
    if columns not in (1, 2):
        raise ValueError(f"columns={columns} is not 1 or 2")
    chosen = VENUES[names[venue.lower()]]
    width = chosen.column if columns == 1 else chosen.text
    with mpl.style.context(["default", _settings(chosen, width)]):  # whatever style or theme the user has set
        yield chosen


def _settings(venue: Venue, width: float) -> dict[str, Any]:
    small = max(6.0, venue.font_size - 1)  # nothing smaller than 6 pt at print size
    sizes = dict.fromkeys(("font.size", "axes.titlesize", "figure.titlesize", "axes.labelsize"), venue.font_size)
    sizes |= dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize", "legend.title_fontsize"), small)
    widths = dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6)
    widths |= dict.fromkeys(("xtick.major.size", "ytick.major.size"), 2.5)
    widths |= dict.fromkeys(("xtick.minor.size", "ytick.minor.size"), 1.5)
    return (
        EMBEDDED
        | sizes
        | widths
        | {
            "figure.figsize": (width, 0.62 * width),
            "figure.dpi": 150,
            "font.family": list(venue.fonts),
            "mathtext.fontset": "stix" if venue.fonts is SERIF else "dejavusans",
            "legend.frameon": False,
            "legend.handlelength": 1.8,  # a dashed line shows two dashes
            "legend.columnspacing": 1.2,
            "figure.facecolor": "white",  # readable under a dark notebook theme, too
            "axes.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.unicode_minus": False,  # some PDF viewers cannot search the typographic one
            "grid.color": "#DDDDDD",
            "grid.linewidth": 0.4,
            "lines.linewidth": 1.2,
            "lines.markersize": 4.0,
            "patch.linewidth": 0.5,
            "axes.labelpad": 2.0,
        }
    )


def new_figure(height: float, constrained: bool = True) -> Figure:
    """An empty figure of the current style's width and `height` inches; it remembers the style for `save_figure`.

    pyplot forgets it at once: a notebook shows it where it is displayed and not a second time at the end of the cell.
    """
    import matplotlib.pyplot as plt

    layout = "constrained" if constrained else "none"
    figure = plt.figure(figsize=(mpl.rcParams["figure.figsize"][0], height), layout=layout)
    plt.close(figure)
    FigureCanvasAgg(figure)  # closing took its canvas away
    if constrained:
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03)
    kept = {name: value for name, value in mpl.rcParams.items() if not name.startswith(("backend", "interactive"))}
    figure.vqlib_style = kept  # read when drawn, and that may be after the `with`
    return figure


def save_figure(figure: Figure, stem: str | Path, data: pd.DataFrame | None = None) -> dict[str, Path]:
    """Write `<stem>.pdf`, `.svg`, `.png` (300 dpi), and `data` as `.csv`, each atomically; returns {suffix: path}.

    The figure is drawn under the style it was made in, a figure of matplotlib's own under matplotlib's defaults.
    """
    stem, contents = Path(stem).expanduser(), {}
    with mpl.style.context("default"), mpl.rc_context(getattr(figure, "vqlib_style", {}) | EMBEDDED):
        for kind in ("pdf", "svg", "png"):
            buffer, undated = io.BytesIO(), {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
            figure.savefig(buffer, format=kind, dpi=300, metadata=undated, facecolor=figure.get_facecolor())
            contents[kind] = buffer.getvalue()
    if data is not None:
        contents["csv"] = data.to_csv(index=not isinstance(data.index, pd.RangeIndex)).encode()
    return {kind: write_bytes(stem.parent / f"{stem.name}.{kind}", content) for kind, content in contents.items()}
