"""Figures show the data they are given: read back from the artists, never from pixels."""

from dataclasses import replace

import families
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import PathCollection, QuadMesh

from vqlib import figures
from vqlib.calibrator.runs import Record
from vqlib.figures.styles import METHOD_COLORS, style
from vqlib.models.structure import quantizable
from vqlib.studies import few_bits

ITERATIONS = np.arange(1, 101)


def record(iteration, losses=(1.0, 2.0), frozen=0.5):
    layer = {"count": 30, "frozen": frozen, "moved": 0.1, "entropy": 1.0, "unused": 0, "histogram": [0, 0, 20, 10]}
    other = {**layer, "count": 10, "frozen": 0.0, "histogram": [0, 10, 0, 0]}
    return Record(iteration, list(losses), 0.7, {"a": layer, "b": other}, seconds=0.1, memory=0)


def run(name, factor=1.0):
    return pd.DataFrame(
        {"iteration": ITERATIONS, "loss": factor / ITERATIONS, "ratio_loss": 1.0, "frozen": 0.5, "run": name}
    )


def test_records_become_one_row_each():
    frame = figures.records_frame([record(1), record(2, losses=(3.0, 4.0))])
    assert list(frame["iteration"]) == [1, 2] and list(frame["loss"]) == [3.0, 7.0]
    assert list(frame["block_1"]) == [2.0, 4.0]
    assert frame["frozen"].iloc[0] == pytest.approx(0.375)  # weighted by sub-vectors: (30 · 0.5 + 10 · 0) / 40


def test_ratio_histograms_are_shares_per_iteration():
    frame = figures.ratio_histograms([record(1), record(5)])
    assert list(frame.index) == [1, 5] and list(frame.columns) == [0, 0.25, 0.5, 0.75]
    assert frame.loc[5].tolist() == [0, 0.25, 0.5, 0.25]
    assert figures.ratio_histograms([record(1)], layer="b").loc[1].tolist() == [0, 1, 0, 0]


def test_loss_curves_draw_every_run_in_its_methods_color():
    frame = pd.concat([run("VQ4DiT, n = 3"), run("codebook only", 2.0)])
    figure = figures.loss_curves(frame, smooth=1)
    assert [axis.get_ylabel() for axis in figure.axes] == ["block loss", "ratio loss", "frozen share"]
    strong = [line for line in figure.axes[0].lines if line.get_alpha() is None]
    assert [line.get_color() for line in strong] == [METHOD_COLORS["VQ4DiT"], METHOD_COLORS["codebook only"]]
    np.testing.assert_allclose(strong[1].get_ydata(), 2.0 / ITERATIONS)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["VQ4DiT, n = 3", "codebook only"]


def test_loss_curves_leave_out_what_there_is_nothing_of():
    frame = run("n = 1").assign(ratio_loss=0.0).drop(columns="frozen")
    assert [axis.get_ylabel() for axis in figures.loss_curves(frame).axes] == ["block loss"]
    with pytest.raises(ValueError, match="'iteration'.*hold none of"):
        figures.loss_curves(frame[["iteration"]])


def test_two_runs_of_one_method_have_two_colors():
    figure = figures.loss_curves(pd.concat([run("VQ4DiT, seed 0"), run("VQ4DiT, seed 1")]), smooth=1)
    first, second = (line.get_color() for line in figure.axes[0].lines)
    assert first == METHOD_COLORS["VQ4DiT"] and second not in METHOD_COLORS.values()


def test_a_run_on_the_output_shows_the_loss_it_is_trained_on():
    on_output = [replace(record(i), output_loss=0.5 / i) for i in (1, 2)]
    frame = figures.records_frame(on_output)
    assert frame["output_loss"].tolist() == [0.5, 0.25]
    axis = figures.loss_curves(frame, smooth=1).axes[0]
    assert axis.get_ylabel() == "output loss" and axis.lines[0].get_ydata().tolist() == [0.5, 0.25]
    both = figures.records_frame([record(1), on_output[1]])  # of different losses that is shown which all have
    assert figures.loss_curves(both).axes[0].get_ylabel() == "block loss"


def test_ratio_heatmap_shows_each_share_in_its_place():
    histograms = figures.ratio_histograms([record(i) for i in (1, 2, 3)])
    mesh = next(
        child for child in figures.ratio_heatmap(histograms).axes[0].get_children() if isinstance(child, QuadMesh)
    )
    shares = np.ma.getdata(mesh.get_array()).reshape(4, 3)  # [bins, steps]
    np.testing.assert_allclose(shares, histograms.to_numpy().T)
    assert np.ma.getmaskarray(mesh.get_array()).reshape(4, 3)[0].all()  # an empty bin is blank, not "few"
    with pytest.raises(ValueError, match="hold no counts"):
        figures.ratio_heatmap(histograms * 0)


@pytest.mark.parametrize(
    "name, place",
    [
        ("transformer_blocks.3.attn1.to_q", (3, "q")),
        ("transformer_blocks.12.attn1.to_out.0", (12, "out")),
        ("transformer_blocks.0.norm1.linear", (0, "adaLN")),
        ("transformer_blocks.5.ff.net.2", (5, "MLP 2")),
        ("blocks.2.other", (2, "other")),
        ("model.transformer_blocks.1.ff_context.net.2", (1, "ff_context.net.2")),
        ("single_transformer_blocks.7.attn.to_q", (7, "single attn.to_q")),
        ("layers.1.attn1.to_q", (1, "q")),
        ("blocks.3", (3, "blocks.3")),
    ],
)
def test_layer_place(name, place):
    assert figures.layer_place(name) == place


@pytest.mark.parametrize("family", [families.plain_dit, families.pixart, families.sd3, families.flux])
def test_every_layer_of_a_family_has_a_place_of_its_own(family):
    names = list(quantizable(family().transformer))
    assert len({figures.layer_place(name) for name in names}) == len(names)
    axis = figures.error_by_layer(pd.DataFrame({"layer": names, "error": 1.0})).axes[0]
    assert np.ma.count(axis.collections[0].get_array()) >= len(names)


def errors(method, factor):
    names = [f"transformer_blocks.{block}.{ending}" for block in range(3) for ending in figures.KINDS]
    return pd.DataFrame({"layer": names, "error": factor * (1 + np.arange(len(names))), "method": method})


def test_error_of_one_method_is_a_map_of_blocks_and_kinds():
    axis = figures.error_by_layer(errors("VQ4DiT", 1.0)).axes[0]
    grid = axis.collections[0].get_array().reshape(len(figures.KINDS), 3)
    assert [label.get_text() for label in axis.get_yticklabels()] == list(figures.KINDS.values())
    assert grid[0].tolist() == [1, 8, 15]  # adaLN of blocks 0, 1, 2


def test_the_map_says_the_blocks_numbers_where_some_have_no_error():
    names = [f"transformer_blocks.{block}.attn1.to_q" for block in (10, 12, 13)]
    axis = figures.error_by_layer(pd.DataFrame({"layer": names, "error": [1.0, 2.0, 3.0]})).axes[0]
    grid = axis.collections[0].get_array().reshape(1, 4)
    assert axis.get_xlim() == (9.5, 13.5) and grid.mask.tolist() == [[False, True, False, False]]
    assert grid.compressed().tolist() == [1, 2, 3]


def test_errors_of_several_methods_are_dots_with_their_median():
    frame = pd.concat([errors("k-means", 2.0), errors("VQ4DiT", 1.0)])
    axis = figures.error_by_layer(frame).axes[0]
    dots = [artist for artist in axis.collections if isinstance(artist, PathCollection)]
    assert len(dots) == 2 * len(figures.KINDS)
    assert sorted(dots[0].get_offsets()[:, 1]) == [2, 16, 30]
    bars = [artist.get_segments()[0][0][1] for artist in axis.collections if not isinstance(artist, PathCollection)]
    assert bars[0] == 16


class Elsewhere(torch.Tensor):
    """A tensor that NumPy cannot read until it is on the CPU."""

    def __array__(self, *_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_codewords_come_from_any_device():
    arrays = torch.rand(9, 2), torch.rand(3, 2), torch.tensor([4, 5, 0])
    shown = figures.codewords_plot(*(array.as_subclass(Elsewhere) for array in arrays)).axes[0].collections[0]
    np.testing.assert_allclose(shown.get_offsets(), arrays[0])


def test_codewords_have_their_place_their_use_and_a_cross_when_unused():
    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    centers = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, 0.5]])
    cloud, usage = figures.codewords_plot(points, centers, torch.tensor([400, 100, 0])).axes
    scattered, used, unused = cloud.collections
    assert len(scattered.get_offsets()) == 500
    np.testing.assert_allclose(used.get_offsets(), centers[:2])
    np.testing.assert_allclose(unused.get_offsets(), centers[2:])
    assert used.get_sizes()[0] == pytest.approx(4 * used.get_sizes()[1])
    assert "1 unused" in usage.texts[0].get_text()
    with pytest.raises(ValueError, match=r"codewords \(3, 2\), counts \(2,\)"):
        figures.codewords_plot(points, centers, torch.tensor([1, 2]))


def test_size_bars_stack_the_parts_and_say_the_factor():
    sizes = pd.DataFrame(
        {
            "method": ["full precision", "VQ4DiT"],
            "weights": [64 * 2**20, 0],
            "codes": [0, 3 * 2**20],
            "biases": [0, 2**20],
        }
    )
    axis = figures.size_bars(sizes).axes[0]
    assert [text.get_text() for text in axis.texts] == ["64 MiB", "4 MiB  (16.0× smaller)"]
    widths = [[patch.get_width() for patch in part] for part in axis.containers]
    assert widths == [[64, 0], [0, 3], [0, 1]]
    with pytest.raises(ValueError, match="hold none of"):
        figures.size_bars(pd.DataFrame({"method": ["x"], "bytes": [1]}))


def test_pareto_front_is_the_best_distance_at_each_size():
    rows = [
        ("full precision", 10.0, 1.0),
        ("VQ4DiT", 1.0, 2.0),
        ("VQ4DiT", 2.0, 1.5),
        ("RTN", 1.5, 9.0),
        ("GPTQ", 1.2, None),
    ]
    table = pd.DataFrame(rows, columns=["method", "size_mib", "fd"]).assign(low=0.5, high=9.5)
    figure = figures.pareto(table.assign(bits=pd.array([None, 2, 4, 3, 2], dtype="Int64")))
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["2", "3", "4"]  # full precision has no bits
    front = next(line for line in figure.axes[0].lines if line.get_drawstyle() == "steps-post")
    assert list(front.get_ydata()) == [2.0, 2.0, 1.5, 1.0]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {
        "full precision",
        "VQ4DiT",
        "RTN",
    }  # no FD: no point


def test_pareto_tells_rivals_apart_and_leaves_open_what_is_marked_so():
    names = [choice.group for choice in few_bits.choices()]
    table = pd.DataFrame(
        {"method": names, "size_mib": 1.0, "fd": 2.0, "open": [name.startswith("l") for name in names]}
    )
    figure = figures.pareto(table)
    drawn = {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}
    assert set(names) == set(drawn) and len({line.get_color() for line in drawn.values()}) == len(set(names))
    assert len({str(line.get_marker()) for line in drawn.values()}) == len(set(names))
    hollow = {name for name, line in drawn.items() if line.get_markerfacecolor() == "white"}
    assert hollow == {"lattice, QuIP#-like", "low rank, SVDQuant-like"}


def test_methods_that_are_not_listed_are_told_apart_in_every_figure():
    names = ["SmoothQuant", "Q-DiT", "PTQ4DiT", "FP8", "fp4 (NVFP4)", "GPTQ", "VQ4DiT"]
    places = pd.DataFrame({"layer": "transformer_blocks.0.attn1.to_q", "error": 1.0, "method": names})
    dots = figures.error_by_layer(places).axes[0].collections
    dots = [artist for artist in dots if isinstance(artist, PathCollection)]
    assert len({(tuple(d.get_facecolor()[0]), d.get_paths()[0].vertices.tobytes()) for d in dots}) == len(names)
    rows = [(name, 2, steps, 100, fd) for name in names for steps, fd in ((50, 2.0), (100, 3.0))]
    rows += [("full precision", None, steps, 100, 1.0) for steps in (50, 100)]
    table = pd.DataFrame(rows, columns=["method", "bits", "steps", "images", "fd"])
    for lines in (
        figures.steps_plot(table, "fd").axes[0].lines,
        figures.pareto(table.assign(size_mib=1.0)[table["steps"] == 50].drop(columns="bits")).axes[0].lines,
    ):
        drawn = {line.get_label(): (line.get_color(), str(line.get_marker())) for line in lines}
        drawn = {name: look for name, look in drawn.items() if name.startswith(tuple(names))}
        assert len(drawn) == len(set(drawn.values())) == len(names)


def test_steps_show_what_is_added_to_full_precision_under_the_same_conditions():
    rows = [
        ("full precision", None, 50, 900, 1.0), ("full precision", None, 100, 300, 3.0),
        ("VQ4DiT", 2, 50, 900, 1.5), ("VQ4DiT", 2, 100, 300, 3.2), ("k-means", 2, 50, 900, 9.0), ("k-means", 2, 100, 300, 5.0),
        ("RTN", 2, 50, 900, 8.0),  # measured at one number of steps: no line
        ("k-means", 2, 250, 100, 7.0),  # nothing to compare it with
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["method", "bits", "steps", "images", "FD"]).astype({"bits": "Int64"})
    frame = figures.steps_frame(table, "FD")
    assert frame[["method", "steps"]].values.tolist() == [
        ["VQ4DiT", 50],
        ["VQ4DiT", 100],
        ["k-means", 50],
        ["k-means", 100],
    ]
    assert frame["added"].tolist() == pytest.approx([0.5, 0.2, 8.0, 2.0])
    axis = figures.steps_plot(table, "FD").axes[0]
    assert [line.get_label() for line in axis.lines] == ["VQ4DiT, 2 bits", "k-means, 2 bits"]
    assert axis.get_yscale() == "log" and [label.get_text() for label in axis.get_xticklabels()] == [
        "50 steps\n900 images",
        "100 steps\n300 images",
    ]
    with pytest.raises(ValueError, match="no method of these 2 rows was sampled with several numbers of steps"):
        figures.steps_plot(table[table["steps"] == 50].head(2), "FD")
    more = pd.concat([table, table[table["steps"] == 100].assign(images=1000)])
    assert figures.steps_plot(more, "FD").axes[0].get_xticklabels()[1].get_text() == "100 steps\n300 or 1000 images"
    below = table.assign(FD=table["FD"].where(table["method"] != "VQ4DiT", 0.9))
    assert figures.steps_plot(below, "FD").axes[0].get_yscale() == "linear"  # better than full precision: no logarithm


@pytest.mark.parametrize("venue", ["AAAI", "notebook"])
def test_figures_are_as_wide_as_the_style_and_titles_stand_clear_of_legends(venue):
    with style(venue) as chosen:
        figure = figures.loss_curves(pd.concat([run("VQ4DiT"), run("release")]), title="claim")
        figure.canvas.draw()
        assert figure.get_size_inches()[0] == chosen.column
        title, entry = (
            figure.legends[0].get_title().get_window_extent(),
            figure.legends[0].get_texts()[0].get_window_extent(),
        )
        assert title.y0 >= entry.y1 - 1 and title.y1 <= figure.bbox.y1 + 1


@pytest.mark.parametrize("venue", ["AAAI", "notebook"])
def test_a_legend_of_long_names_stays_inside_the_figure(venue):
    rows = pd.DataFrame(
        [(f"a method with a long name, {i}", 1.0 + i, 2.0 - 0.1 * i) for i in range(9)],
        columns=["method", "size_mib", "fd"],
    )
    with style(venue):
        figure = figures.pareto(rows, "Title")
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
