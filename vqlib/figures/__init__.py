"""Data to matplotlib Figures, one function each: sizes come from the surrounding `style`, files from `save_figure`.

`with style("AAAI"): figure = loss_curves(frame)`, then `save_figure(figure, "data/figures/losses", data=frame)`.
"""

from vqlib.figures.ablations import ablation_plot
from vqlib.figures.agreement import agreement_plot, choice_by_distance, winner_plot
from vqlib.figures.codebooks import codewords_plot, convergence_plot, geometry_plot
from vqlib.figures.grids import difference_map, image_grid
from vqlib.figures.layers import KINDS, error_by_layer, layer_place
from vqlib.figures.records import (
    block_losses,
    layer_frame,
    loss_curves,
    ratio_curves,
    ratio_heatmap,
    ratio_histograms,
    records_frame,
)
from vqlib.figures.sizes import pareto, size_bars
from vqlib.figures.steps import steps_frame, steps_plot
from vqlib.figures.styles import METHOD_COLORS, VENUES, save_figure, style

__all__ = [
    "KINDS", "METHOD_COLORS", "VENUES", "ablation_plot", "agreement_plot", "block_losses", "choice_by_distance",
    "codewords_plot", "convergence_plot", "difference_map", "error_by_layer", "geometry_plot", "image_grid",
    "layer_frame", "layer_place", "loss_curves", "pareto", "ratio_curves", "ratio_heatmap", "ratio_histograms",
    "records_frame", "save_figure", "size_bars", "steps_frame", "steps_plot", "style", "winner_plot",
]  # fmt: skip
