"""Every committed notebook shows its figures when it is opened, before anything runs, in both themes."""

import nbformat
import pytest

from tests.browser.conftest import NOTEBOOKS
from tests.browser.lab import THEMES, WIDTH


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opened_without_running_shows_its_figures(lab, path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    stored = sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    lab.open(path.name)
    widths = lab.figures()
    assert len(widths) == stored > 0 and min(widths) > 100
    for theme in THEMES:
        lab.theme(theme)
        lab.screenshot(f"{path.stem}_{theme}", lab.images.last)
    assert max(lab.right_edges(lab.images)) <= WIDTH, "a figure is wider than the page"
    lab.close()
    assert not lab.complaints
