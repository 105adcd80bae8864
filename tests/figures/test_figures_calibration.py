"""Figures of runs, codebooks and ablations show the data they are given: read back from the artists, never from pixels."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection

from vqlib import figures
from vqlib.calibrator.runs import Record
from vqlib.figures.styles import METHOD_COLORS, style


def record(iteration, layers=None, losses=(1.0, 2.0)):
    layer = {"count": 30, "frozen": 0.5, "moved": 0.1, "entropy": 1.0, "unused": 2, "histogram": [0, 20, 10]}
    return Record(iteration, list(losses), 0.7, layers or {"a": layer, "b": {**layer, "unused": 1}}, 0.1, memory=5)


def test_records_carry_memory_and_the_unused_codewords_of_all_layers():
    row = figures.records_frame([record(1)]).iloc[0]
    assert row["memory"] == 5 and row["unused"] == 3


def test_a_figure_of_every_layer_is_a_column_each():
    frame = figures.layer_frame([record(1), record(4)], "unused")
    assert frame.index.tolist() == [1, 4] and frame.loc[4].to_dict() == {"a": 2, "b": 1}


def test_a_run_without_ratios_has_no_histograms():
    layer = {"count": 30, "frozen": 1.0, "moved": 0.0, "entropy": 0.0, "unused": 0}
    with pytest.raises(ValueError, match="iteration 3 holds no ratios: a run with n = 1"):
        figures.ratio_histograms([record(3, {"a": layer})])


def test_ratio_curves_draw_entropy_frozen_and_moved():
    figure = figures.ratio_curves(figures.records_frame([record(1), record(2)]))
    assert [axis.get_ylabel() for axis in figure.axes] == list(figures.records.RATIO_PANELS.values())
    assert list(figure.axes[0].lines[0].get_ydata()) == [1.0, 1.0]


def test_block_losses_are_the_means_of_the_first_and_the_last_records():
    records = [record(i, losses=(1.0 / i, 2.0 / i)) for i in (1, 2, 4, 8)]
    axis = figures.block_losses(figures.records_frame(records), window=2).axes[0]
    assert [list(line.get_ydata()) for line in axis.lines[:2]] == [[0.75, 1.5], [0.1875, 0.375]]
    assert [text.get_text() for text in axis.figure.legends[0].texts] == [
        "VQ4DiT",
        "first 2 iterations",
        "last 2 iterations",
    ]
    with pytest.raises(ValueError, match="no block losses"):
        figures.block_losses(pd.DataFrame({"iteration": [1]}))


def agreement():
    names = ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_q", "transformer_blocks.0.ff.net.2"]
    rows = [
        (stage, name, 2 + i, shift + i)
        for stage, shift in (("k-means", 0.1), ("chance", 0.0))
        for i, name in enumerate(names)
    ]
    return pd.DataFrame(rows, columns=["stage", "layer", "members", "cosine"])


def test_agreement_is_cumulated_over_subvectors_and_averaged_by_kind():
    left, right = figures.agreement_plot(agreement()).axes
    curves = {line.get_label(): line for line in left.lines}
    assert list(curves["k-means"].get_xdata()) == [0.1, 1.1, 2.1]
    np.testing.assert_allclose(curves["k-means"].get_ydata(), [2 / 9, 5 / 9, 1.0])
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["q", "MLP 2"]
    np.testing.assert_allclose(right.lines[0].get_ydata(), [(2 * 0.1 + 3 * 1.1) / 5, 2.1])
    assert curves["k-means"].get_color() == METHOD_COLORS["k-means"]


def test_winner_bars_are_shares_of_all_layers_together():
    rows = [("a", 1, 30), ("a", 2, 10), ("b", 1, 10), ("b", 2, 50)]
    frame = pd.DataFrame(rows, columns=["layer", "position", "count"])
    axis = figures.winner_plot(frame).axes[0]
    assert [bar.get_height() for bar in axis.containers[0]] == [0.4, 0.6]
    assert [text.get_text() for text in axis.texts] == ["40.0%", "60.0%", "blind choice 0.5"]
    assert axis.lines[0].get_ydata()[0] == 0.5  # chance
    both = pd.concat([frame.assign(run="VQ4DiT, equal start"), frame.assign(run="VQ4DiT, distance start")])
    figure = figures.winner_plot(both)
    assert len(figure.axes[0].containers) == 2 and len(figure.legends[0].get_texts()) == 2


def test_choices_are_drawn_at_their_distance():
    choices = pd.DataFrame({"relative_distance": [1.0, 1.5], "share": [0.4, 0.3], "count": [10, 5]})
    axis = figures.choice_by_distance(choices, chance=0.5).axes[0]
    assert axis.lines[-1].get_ydata()[0] == 0.5 and axis.get_ylim()[1] > 0.5
    np.testing.assert_allclose(axis.collections[0].get_offsets(), [(1.0, 0.4), (1.5, 0.3)])
    assert axis.collections[0].get_sizes()[0] == 2 * axis.collections[0].get_sizes()[1]


def test_convergence_has_one_line_per_run_and_one_label_per_start():
    rows = [(start, seed, i, 1.0 / i) for start in ("distinct", "random") for seed in (0, 1) for i in (1, 2, 4)]
    figure = figures.convergence_plot(pd.DataFrame(rows, columns=["start", "seed", "iteration", "error"]))
    assert len(figure.axes[0].lines) == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["distinct", "random"]


def test_geometry_has_one_line_per_length_and_the_bounds():
    errors = pd.DataFrame({"bits": [2, 1, 2], "d": [4, 4, 2], "error": [0.1, 0.3, 0.12]})
    axis = figures.geometry_plot(errors, bounds={"bound": ([1, 2], [0.25, 0.0625])}).axes[0]
    assert [line.get_label() for line in axis.lines] == ["$d$ = 2", "$d$ = 4", "bound"]
    assert list(axis.lines[1].get_ydata()) == [0.3, 0.1]  # by bits


def test_ablations_have_a_panel_per_group_a_dot_per_seed_and_leave_out_what_is_not_measured():
    rows = [("n", f"n = {n}", seed, 1.0 + n + seed) for n in (1, 2) for seed in (0, 1, 2)]
    rows += [("scope", "layer", 0, 3.0), ("scope", "model", 0, None)]
    frame = pd.DataFrame(rows, columns=["group", "setting", "seed", "fd"])
    figure = figures.ablation_plot(frame, references={"k-means": 9.0})
    first, second = figure.axes[:2]
    dots = [artist for artist in first.collections if isinstance(artist, PathCollection)]
    assert [sorted(dot.get_offsets()[:, 1]) for dot in dots] == [[2, 3, 4], [3, 4, 5]]
    assert [tick.get_text() for tick in second.get_xticklabels()] == ["layer"]
    assert first.lines[0].get_ydata()[0] == 9.0
    with pytest.raises(ValueError, match="'fd'"):
        figures.ablation_plot(frame.assign(fd=np.nan))


@pytest.mark.parametrize("venue", ["AAAI", "notebook"])
def test_they_can_be_drawn_at_the_width_of_a_venue(venue):
    with style(venue) as chosen:
        for figure in (
            figures.agreement_plot(agreement(), "claim"),
            figures.ratio_curves(figures.records_frame([record(1)])),
        ):
            figure.canvas.draw()
            assert figure.get_size_inches()[0] == chosen.column
