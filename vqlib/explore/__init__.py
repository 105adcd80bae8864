"""Views to play with in JupyterLab: a still figure first, then sliders; every one can export what it shows.

`images(pipe, models)`, `codebook(transformer, packed)`, `ratios(run_folder)`, `compare(run_a, run_b)` and the live
`run(calibration)`. Without ipywidgets each shows its still figure, and `view.set(...)` takes the place of the sliders.
"""

from vqlib.explore.frontend import show
from vqlib.explore.live import RunView as run
from vqlib.explore.pictures import images
from vqlib.explore.records import CompareView as compare
from vqlib.explore.records import RatioView as ratios
from vqlib.explore.view import View
from vqlib.explore.weights import CodebookView as codebook

__all__ = ["codebook", "compare", "images", "ratios", "run"]

View.show = show
