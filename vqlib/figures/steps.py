"""What quantization costs at each number of DDPM steps, measured against full precision under the same conditions."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from vqlib.figures.layout import legended, log_scale, panel
from vqlib.figures.styles import FULL_PRECISION, method_looks

LINES = {2: "-", 3: "--", 4: ":"}  # by bits


def steps_frame(table: pd.DataFrame, distance: str) -> pd.DataFrame:
    """Columns method, bits, steps, images, `distance` and added: what is above full precision's with those steps and images.

    table: columns method, bits, steps, images and `distance`. Methods that were measured at one number of steps only, and
    rows without full precision beside them, are left out. A distance is biased by the number of images; in `added` most of
    the bias cancels, the spread does not, so points of few images are uncertain.
    """
    conditions = ["steps", "images"]
    base = table[table["method"] == FULL_PRECISION].set_index(conditions)[distance]
    found = table.loc[table["method"] != FULL_PRECISION, ["method", "bits", *conditions, distance]]
    found = found.join(base.rename("base"), on=conditions).dropna(subset=["base"])
    found["added"] = found[distance] - found["base"]
    several = found.groupby(["method", "bits"])["steps"].transform("nunique") > 1
    return found[several].drop(columns="base").reset_index(drop=True)


def steps_plot(table: pd.DataFrame, distance: str, title: str | None = None) -> Figure:
    """DDPM steps against the distance above full precision's, a line per method and bits; see `steps_frame`.

    ValueError where no method was sampled with several numbers of steps.
    """
    frame = steps_frame(table, distance)
    if frame.empty:
        raise ValueError(f"no method of these {len(table)} rows was sampled with several numbers of steps")
    figure, axis = panel(0.5)
    looks = method_looks(frame["method"].unique())
    for (method, bits), line in frame.groupby(["method", "bits"], sort=False):
        line = line.sort_values("steps")
        look = dict(zip(("color", "marker"), looks[method], strict=True)) | {"linestyle": LINES.get(bits, "-")}
        axis.plot(line["steps"], line["added"], label=f"{method}, {bits} bits", **look)
    if (frame["added"] > 0).all():
        log_scale(axis, "y")
    axis.set_xscale("log")
    counts = frame.groupby("steps")["images"].agg(lambda images: " or ".join(map(str, sorted(set(images)))))
    axis.set_xticks(counts.index, [f"{steps} steps\n{images} images" for steps, images in counts.items()])
    axis.minorticks_off()
    axis.set(ylabel=f"{distance} above full precision's")
    return legended(figure, title, axis)
