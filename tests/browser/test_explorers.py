"""The notebook of sliders with small parameters: keys move sliders, pictures change, exports are there."""

from pathlib import Path

import nbformat
import pytest

from tests.browser.conftest import NOTEBOOKS, write_small
from tests.browser.lab import THEMES, Explorer

VIEWS = ("run", "images", "codebook", "ratios", "compare")
SOURCE = next(path for path in NOTEBOOKS if path.stem.endswith("explore"))


@pytest.fixture(scope="module")
def page(lab, folder):
    """The notebook after Run All."""
    lab.open(write_small(SOURCE, folder / "explore_small.ipynb", out=str(folder / "run")).name)
    lab.run_all()
    return lab


def moved(page, view, label, *keys):
    """Press keys on a slider and wait for another picture; returns it with the line above it."""
    explorer = Explorer(page, view)
    before = explorer.picture
    explorer.press(label, *keys)
    explorer.until_picture_is_not(before)
    explorer.until(r"[^…]$")  # no longer a preview
    return explorer.picture, explorer.caption


@pytest.mark.parametrize(
    "view, label, there, back",
    [
        ("images", "bits", ["ArrowRight"], ["ArrowLeft"]),
        ("images", "timesteps", ["ArrowRight"], ["ArrowLeft"]),
        ("images", "CFG", ["ArrowRight"], ["ArrowLeft"]),
        ("images", "first seed", ["ArrowRight"], ["ArrowLeft"]),
        ("codebook", "layer", ["ArrowRight"], ["ArrowLeft"]),
        ("codebook", "inputs", ["ArrowRight"], ["ArrowLeft"]),
        ("ratios", "step", ["ArrowLeft"], ["ArrowRight"]),
        ("compare", "smooth", ["Home"], ["ArrowRight"] * 3),
    ],
)
def test_a_key_on_a_slider_changes_the_picture_and_the_way_back_is_the_same(page, view, label, there, back):
    explorer = Explorer(page, view)
    before = explorer.picture, explorer.caption
    assert moved(page, view, label, *there) != before
    moved(page, view, label, *back)
    assert (explorer.picture, explorer.caption) == before


def test_a_class_and_a_method_are_chosen_with_a_click(page):
    explorer = Explorer(page, "images")
    before = explorer.caption
    explorer.box.locator("select").first.select_option("sneaker")
    picture = explorer.picture
    explorer.box.get_by_role("button", name="codebook only").click()
    explorer.until("^codebook only.*mean difference")
    explorer.until_picture_is_not(picture)
    explorer.button("k-means").click()
    explorer.box.locator("select").first.select_option("every class")
    explorer.until("^k-means")
    explorer.until(r"[^…]$")
    assert explorer.caption == before


def test_a_newer_request_overtakes_an_older_one(page):
    explorer = Explorer(page, "images")
    explorer.press("first seed", *["ArrowRight"] * 4)
    explorer.until("seeds 4 …")
    explorer.press("first seed", *["ArrowLeft"] * 4)
    explorer.until("seeds 0 …")


def test_the_still_figure_gives_way_to_the_live_one(page):
    for name in VIEWS:
        cell = page.page.locator(".jp-Cell-outputArea").filter(has=page.page.locator(f".vqlib-{name}"))
        assert [image.is_visible() for image in cell.locator("img").all()] == [False, True]


@pytest.mark.parametrize("name", VIEWS)
def test_export_writes_files_and_says_where(page, name):
    explorer = Explorer(page, name)
    explorer.box.locator("select").filter(has_text="AAAI").select_option("AAAI")
    explorer.button("Export").click()
    stem = Path(explorer.until(r"^(.*) \(\.pdf, \.svg, \.png, \.csv", ".vqlib-path")[1])
    assert "_AAAI" in stem.name
    for suffix in ("pdf", "svg", "png", "csv"):
        assert stem.with_name(f"{stem.name}.{suffix}").stat().st_size > 0


def test_live_views_fit_the_page_in_both_themes(page):
    for theme in THEMES:
        page.theme(theme)
        for name in VIEWS:
            explorer = Explorer(page, name)
            page.screenshot(f"live_{name}_{theme}", explorer.button("Export"))
            box = explorer.box.bounding_box()
            assert box["x"] + box["width"] <= page.page.viewport_size["width"]
            assert explorer.box.evaluate("box => box.scrollWidth <= box.clientWidth + 1"), f"{name} is cut off"


def test_the_console_is_quiet(page):
    assert not page.complaints


def test_saved_and_reopened_without_its_kernel_it_shows_still_figures(page, folder):
    page.command("docmanager:save")
    page.close()
    page.end_kernels()
    saved = nbformat.read(folder / "explore_small.ipynb", as_version=4)
    outputs = [output for cell in saved.cells if cell.cell_type == "code" for output in cell.outputs]
    stills = sum("image/png" in output.get("data", {}) for output in outputs)
    page.open("explore_small.ipynb")
    widths = page.figures()
    assert len(widths) == stills == len(VIEWS) and min(widths) > 100
    page.screenshot("reopened", page.images.last)
    assert all("widget model not found" in text for text in page.complaints)  # JupyterLab's own, one a live view
