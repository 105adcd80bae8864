"""Images of several models on paper: the same seeds below each other, and where they differ."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import lru_cache

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from torch import Tensor

from vqlib.figures.layout import note, page_width
from vqlib.figures.styles import method_color, new_figure

SHOWN_PIXELS = 128  # smaller images are enlarged by a whole factor, so that no viewer blurs them
GAP = 0.05  # between images, as a share of an image's width
TILT = 40  # degrees, for column labels wider than an image
LABEL_CHARACTERS = (13, 18, 26)  # row labels are wrapped at the first of these that takes two lines at most


def image_grid(rows: Mapping[str, Tensor], columns: Sequence[str] | None = None, title: str | None = None) -> Figure:
    """One labeled row of images per model, the same seeds in every row. Values: uint8 [B, C, H, W], C = 1 (gray) or 3.

    `columns` [B] stand above. Raises ValueError where rows differ in shape or labels in number.
    """
    images = _checked(rows, columns)
    return _grid({name: _pixels(row) for name, row in images.items()}, columns, title)


def difference_map(
    reference: Tensor,
    other: Tensor,
    names: tuple[str, str],
    columns: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Two rows of uint8 images [B, C, H, W] and below them |difference|, the mean over channels, in pixel values."""
    if len({*names, "difference"}) < 3:
        raise ValueError(f"rows are named {', '.join(names)} and difference: three different names are needed")
    images = _checked(dict(zip(names, (reference, other), strict=True)), columns)
    first, second = (row.float() for row in images.values())
    gap = (first - second).abs().mean(dim=1, keepdim=True)  # [B, C, H, W] -> [B, 1, H, W]
    top = max(1.0, float(gap.max()))
    colored = mpl.colormaps["magma"](gap.squeeze(1).numpy() / top)[..., :3]  # [B, H, W] -> [B, H, W, 3]
    rows = {name: _pixels(row) for name, row in images.items()}
    rows["difference"] = (colored * 255).round().astype(np.uint8)
    return _grid(rows, columns, title, bar=(top, "difference in pixel values (0 … 255)"))


def _checked(rows: Mapping[str, Tensor], columns: Sequence[str] | None) -> dict[str, Tensor]:
    images = {name: row.detach().cpu() for name, row in rows.items()}
    if not images:
        raise ValueError("no rows to show")
    first_name, first = next(iter(images.items()))
    for name, row in images.items():
        if row.ndim != 4 or row.shape[1] not in (1, 3) or "uint8" not in str(row.dtype):
            raise ValueError(f"row {name!r} is {row.dtype} {tuple(row.shape)}; images are uint8 [B, 1 or 3, H, W]")
        if not row.numel():
            raise ValueError(f"row {name!r} is {tuple(row.shape)}: there is no image to show")
        if row.shape != first.shape:
            raise ValueError(f"row {name!r} is {tuple(row.shape)} but row {first_name!r} is {tuple(first.shape)}")
    if columns is not None and len(columns) != len(first):
        raise ValueError(f"{len(columns)} column labels for {len(first)} images a row")
    return images


def _pixels(row: Tensor) -> np.ndarray:
    return row.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()  # [B, C, H, W] -> [B, H, W, 3]


def _grid(
    rows: dict[str, np.ndarray], columns: Sequence[str] | None, title: str | None, bar: tuple[float, str] | None = None
) -> Figure:
    """Lay out in inches: row labels, column labels, one picture of all images, a color bar from 0 to `bar`."""
    canvas, cell, gap = _canvas(list(rows.values()))
    width, size = page_width(), mpl.rcParams["font.size"]
    small = FontProperties(size=mpl.rcParams["legend.fontsize"]).get_size_in_points()
    line = size * 1.35 / 72
    labels = _row_labels(list(rows))
    crowded = max(map(len, labels.values())) * size * 1.25 / 72 > (width - 0.7) / len(next(iter(rows.values())))
    size = small if crowded else size
    left = max(_inches(part, size) for lines in labels.values() for part in lines) + 0.17
    scale = (width - left - 0.01) / canvas.shape[1]  # inches a pixel
    tilted = columns is not None and max(_inches(name, small) for name in columns) > (cell + gap) * scale
    above = 0.0 if columns is None else _head(columns, small, tilted)
    right = _overhang(columns[-1], small, cell * scale, tilted) if columns is not None else 0.0
    scale = (width - left - 0.01 - right) / canvas.shape[1]
    above += line + 0.05 if title else 0.02
    below = 0.3 if bar else 0.02
    height = above + canvas.shape[0] * scale + below
    figure = new_figure(height, constrained=False)
    box = (left / width, below / height, canvas.shape[1] * scale / width, canvas.shape[0] * scale / height)
    axis = figure.add_axes(box, frameon=False, xticks=[], yticks=[])
    axis.imshow(canvas, interpolation="none", aspect="auto")
    _label_rows(axis, labels, gap, size, left / (canvas.shape[1] * scale))
    turn = {"rotation": TILT, "rotation_mode": "anchor", "ha": "left"} if tilted else {"ha": "center"}
    for j, name in enumerate(columns or ()):
        place = j * (cell + gap) + cell / 2, 1
        note(axis, name, place, (0, 3), axis.get_xaxis_transform(), va="baseline", fontsize=small, **turn)
    if title:
        figure.text(0.5, 1 - 0.05 / height, title, ha="center", va="top", fontsize=size)
    if bar:
        beside = (_inches(bar[1], small) + 0.15) / width  # the bar's label, to its right
        long = min(box[2] * 0.45, box[2] - beside)
        _color_bar(figure, (left / width, 0.18 / height, long, 0.06 / height), *bar, small)
    return figure


def _row_labels(names: list[str]) -> dict[str, list[str]]:
    for limit in LABEL_CHARACTERS:
        labels = {name: _wrapped(name, limit) for name in names}
        if max(map(len, labels.values())) <= 2:
            break
    return labels


def _wrapped(name: str, limit: int) -> list[str]:
    """A row's label in lines of at most `limit` characters, broken at its commas rather than at its spaces."""
    lines: list[str] = []
    for part in name.split(", "):
        joined = f"{lines[-1]}, {part}" if lines else part
        lines = [*lines[:-1], joined] if len(joined) <= limit else lines + textwrap.wrap(part, limit)
    return lines


def _canvas(rows: list[np.ndarray]) -> tuple[np.ndarray, int, int]:
    """All images on white, the pixels of one image's side and of a gap. R × [B, H, W, 3] -> [height, width, 3]."""
    factor = max(1, math.ceil(SHOWN_PIXELS / rows[0].shape[1]))
    big = [row.repeat(factor, axis=1).repeat(factor, axis=2) for row in rows]
    count, tall, wide, _ = big[0].shape
    gap = max(1, round(GAP * wide))
    canvas = np.full((len(rows), tall + gap, count, wide + gap, 3), 255, np.uint8)
    canvas[:, :tall, :, :wide] = np.stack(big).swapaxes(1, 2)  # [R, B, H, W, 3] -> [R, H, B, W, 3]
    return canvas.reshape(len(rows) * (tall + gap), -1, 3)[:-gap, :-gap], wide, gap


def _inches(text: str, size: float) -> float:
    """Printed width of one line of text in the current style's font."""
    return _width(text, size, tuple(mpl.rcParams["font.family"]))


@lru_cache(maxsize=1024)
def _width(text: str, size: float, fonts: tuple[str, ...]) -> float:
    if not text.strip():
        return 0.0
    return TextPath((0, 0), text, size=size, prop=FontProperties(family=list(fonts))).get_extents().width / 72


def _head(columns: Sequence[str], size: float, tilted: bool) -> float:
    line = size * 1.3 / 72
    if not tilted:
        return line + 0.03
    angle = math.radians(TILT)
    return max(_inches(name, size) for name in columns) * math.sin(angle) + line * math.cos(angle) + 0.03


def _overhang(label: str, size: float, cell: float, tilted: bool) -> float:
    """How far the last image's label reaches past it: centered on the image, or tilted from its middle."""
    if not tilted:
        return max(0.0, (_inches(label, size) - cell) / 2) + 0.02
    angle, line = math.radians(TILT), size * 1.3 / 72
    return max(0.0, _inches(label, size) * math.cos(angle) + line * math.sin(angle) - cell / 2)


def _label_rows(axis, labels: dict[str, list[str]], gap: int, size: float, left: float) -> None:
    """Text at the left edge with a bar in the method's color between it and the images."""
    tall, side = (axis.images[0].get_array().shape[0] + gap) / len(labels) - gap, axis.get_yaxis_transform()
    look = {"ha": "right", "va": "center", "fontsize": size, "linespacing": 1.1}
    for i, (name, lines) in enumerate(labels.items()):
        top = i * (tall + gap)
        note(axis, "\n".join(lines), (0, top + tall / 2), (-8, 0), side, **look)
        if name != "difference":
            bar = {"transform": side, "color": method_color(name), "linewidth": 0, "clip_on": False}
            axis.add_patch(Rectangle((-0.055 * left - 0.002, top), 0.055 * left * 0.6, tall, **bar))


def _color_bar(figure: Figure, box: tuple[float, ...], top: float, label: str, size: float) -> None:
    axis = figure.add_axes(box)
    axis.imshow(np.linspace(0, 1, 256)[None], cmap="magma", aspect="auto", extent=(0, top, 0, 1))
    axis.set(yticks=[], xticks=[0, top], xticklabels=["0", f"{top:.3g}"])
    axis.tick_params(length=0, pad=1.5, labelsize=size)
    axis.spines[:].set_visible(False)
    axis.grid(False)
    note(axis, label, (1, 0.5), (8, 0), "axes fraction", va="center", fontsize=size)
