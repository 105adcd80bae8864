"""Figures of packed models show the numbers they are given, and refuse tables without any."""

import pandas as pd
import pytest

from tests.fuzz_checkpoint import pack, tiny_dit
from vqlib import size_report
from vqlib.figures.storage import bits_by_layer, mode_times
from vqlib.figures.styles import save_figure, style


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_bars_are_the_bits_of_each_kind_and_their_areas_the_bytes():
    report = size_report(pack(tiny_dit(), k=16, d=4))
    with style("AAAI"):
        figure = bits_by_layer(report, "Small layers pay for their codebooks")
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["adaLN", "q", "k", "v", "out", "MLP 1", "MLP 2"]
    codes, books = axis.containers
    assert all(bar.get_height() == pytest.approx(1.0) for bar in codes)  # log2(16) / 4
    assert texts(figure)[1] == f"{1 + 16 * 4 * 32 / 256:.2f}"  # q: a float32 codebook for 256 weights
    areas = sum(bar.get_height() * bar.get_width() for bars in (codes, books) for bar in bars)
    assert areas == pytest.approx(report.attrs["bits_per_weight"])
    assert axis.lines[0].get_label() == f"all packed layers: {areas:.2f}"
    with pytest.raises(ValueError, match="no packed layers"):
        bits_by_layer(report.tail(1))


def test_modes_stand_beside_each_other_over_the_floor(tmp_path):
    methods = {"full precision": 1.0, "speed mode": 1.01, "memory mode": 1.2, "matrix products alone": 0.6}
    rows = [
        {"batch": batch, "method": name, "ms": 10 * ratio, "ratio": ratio, "low": ratio - 0.1, "high": ratio + 0.1}
        for batch in (1, 4)
        for name, ratio in methods.items()
    ]
    with style("notebook"):
        figure = mode_times(pd.DataFrame(rows), "Memory mode costs a fifth")
    assert texts(figure) == ["1.01", "1.20"] * 2
    floors = [bars for bars in figure.axes[0].containers if len(bars) == 1 and hasattr(bars[0], "get_height")]
    assert [bars[0].get_height() for bars in floors] == [0.6, 0.6]
    assert save_figure(figure, tmp_path / "modes")["pdf"].stat().st_size > 1000
    with pytest.raises(ValueError, match="nothing to compare with 'full precision'"):
        mode_times(pd.DataFrame(rows[:1]))
