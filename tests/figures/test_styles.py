"""Exact widths, embedded fonts, one color per method, files whole."""

import xml.etree.ElementTree as ElementTree

import matplotlib as mpl
import matplotlib.figure
import matplotlib.image
import matplotlib.style
import pandas as pd
import pytest
import torch
from printed import page_width, printed_sizes

from vqlib.figures.grids import difference_map
from vqlib.figures.styles import METHOD_COLORS, VENUES, method_color, method_marker, new_figure, save_figure, style


def plot():
    figure = new_figure(1.5)
    axis = figure.subplots()
    axis.plot([1, 2], [3, 4])
    axis.set(xlabel="iteration $t$", ylabel="loss")
    return figure


@pytest.mark.parametrize("venue, columns", [("AAAI", 1), ("aaai", 2), ("NeurIPS", 1), ("ICML", 1), ("CVPR", 2)])
def test_the_pdf_is_exactly_as_wide_as_the_column_and_its_fonts_are_embedded(tmp_path, venue, columns):
    with style(venue, columns) as chosen:
        figure = plot()
    path = save_figure(figure, tmp_path / "f")["pdf"]
    expected = chosen.column if columns == 1 else chosen.text
    assert page_width(path) == pytest.approx(expected * 72, abs=0.01)
    pdf = path.read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf
    assert b"STIXGeneral" in pdf and b"DejaVu" not in pdf


def test_png_is_300_dpi_and_svg_needs_no_font(tmp_path):
    with style("AAAI"):
        figure = plot()
    paths = save_figure(figure, tmp_path / "deep" / "figure.one", data=pd.DataFrame({"x": [1, 2]}))
    assert {kind: path.name for kind, path in paths.items()} == {
        kind: f"figure.one.{kind}" for kind in ("pdf", "svg", "png", "csv")
    }
    assert mpl.image.imread(paths["png"]).shape[1] == int(3.3125 * 300)
    tags = {element.tag.rsplit("}")[-1] for element in ElementTree.parse(paths["svg"]).iter()}
    assert "path" in tags and "text" not in tags
    assert paths["csv"].read_text() == "x\n1\n2\n"
    assert len(list((tmp_path / "deep").iterdir())) == 4  # no leftovers


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    with style("ICML"):
        first, second = save_figure(plot(), tmp_path / "a"), save_figure(plot(), tmp_path / "b")
    assert all(first[kind].read_bytes() == second[kind].read_bytes() for kind in first)


@pytest.mark.parametrize("venue", VENUES)
def test_printed_text_is_6_points_or_larger(tmp_path, venue):
    seeds = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 256, (8, 1, 32, 32), dtype=torch.uint8, generator=seeds) for _ in range(2)]
    with style(venue) as chosen:
        names = [f"ankle boot {i}" for i in range(8)]
        grid = difference_map(*rows, ("full precision", "VQ4DiT, n = 3, 2 bits"), names, title="claim")
        files = [save_figure(figure, tmp_path / name)["pdf"] for name, figure in (("plot", plot()), ("grid", grid))]
    for file in files:
        sizes = printed_sizes(file)
        assert sizes and 6 <= min(sizes) and max(sizes) <= chosen.font_size


@pytest.mark.parametrize("venue", VENUES)
def test_no_text_is_smaller_than_6_points(venue):
    with style(venue):
        sizes = [
            mpl.rcParams[key]
            for key in ("font.size", "xtick.labelsize", "ytick.labelsize", "legend.fontsize", "axes.labelsize")
        ]
    assert min(sizes) >= 6


def test_unknown_venues_and_widths_are_refused():
    with pytest.raises(ValueError, match="'ICLR' is not one of AAAI"), style("ICLR"):
        pass
    with pytest.raises(ValueError, match="columns=3"), style("AAAI", columns=3):
        pass


def test_a_style_leaves_nothing_behind():
    before = dict(mpl.rcParams)
    with style("AAAI"):
        pass
    assert dict(mpl.rcParams) == before


def test_one_method_one_color_however_it_is_qualified():
    assert method_color("VQ4DiT, n = 3") == method_color("VQ4DiT") == METHOD_COLORS["VQ4DiT"]
    assert method_color("VQ4DiT, distilled, 2 bits") == METHOD_COLORS["VQ4DiT, distilled"]
    assert method_color("k-means only, 2 bits") == METHOD_COLORS["k-means"]
    assert method_color("GPTVQ-like") != method_color("GPTQ group-wise") == METHOD_COLORS["GPTQ"]
    assert method_color("round-to-nearest") == METHOD_COLORS["RTN"]
    assert method_color("something new") == method_color("something new")
    assert method_color("FP16") == METHOD_COLORS["full precision"] not in map(method_color, ("FP8", "fp4 (NVFP4)"))
    assert method_color("n = 1, 700 iterations") == METHOD_COLORS["codebook only"] != method_color("n = 10")
    assert (
        len(set(METHOD_COLORS.values())) == len(METHOD_COLORS) == len({method_marker(name) for name in METHOD_COLORS})
    )


UGLY = {
    "savefig.bbox": "tight",
    "savefig.dpi": 30,
    "savefig.transparent": True,
    "savefig.facecolor": "black",
    "font.size": 25,
    "xtick.labelsize": 30,
    "axes.labelcolor": "yellow",
    "axes.prop_cycle": mpl.cycler(color=["white"]),
    "figure.autolayout": True,
    "axes.titleweight": "bold",
    "text.color": "white",
    "image.cmap": "jet",
    "pdf.fonttype": 3,
}


@pytest.mark.parametrize("user", ["dark_background", "ggplot", "grayscale", UGLY], ids=str)
@pytest.mark.parametrize("inside", [True, False])
def test_an_exported_figure_is_the_venues_whatever_style_the_user_has_set(tmp_path, user, inside):
    def exported(name):
        with style("AAAI"):
            figure = plot()
            if inside:
                return save_figure(figure, tmp_path / name)
        return save_figure(figure, tmp_path / name)

    plain = exported("plain")
    with mpl.style.context(user):
        themed = exported("themed")
    assert all(plain[kind].read_bytes() == themed[kind].read_bytes() for kind in ("pdf", "svg", "png"))


def test_a_figure_made_under_the_users_own_style_keeps_its_background(tmp_path):
    with mpl.style.context("dark_background"):
        figure = mpl.figure.Figure()
        figure.subplots().set_xlabel("step")
    path = save_figure(figure, tmp_path / "dark")["png"]
    assert mpl.image.imread(path)[0, 0, :3].tolist() == [0, 0, 0]
