"""The tour with small parameters, as a user runs it: Run All Cells, then save, close and open it again."""

from tests.browser.conftest import NOTEBOOKS, write_small


def test_the_tour_runs_is_saved_and_shows_its_figures_again(lab, folder):
    name = write_small(NOTEBOOKS[0], folder / "tour_small.ipynb", out=str(folder / "tour")).name
    lab.open(name)
    assert not lab.figures()
    lab.run_all()
    seen = lab.figures()
    assert seen and min(seen) > 100
    lab.command("docmanager:save")
    lab.close()
    lab.open(name)
    assert lab.figures() == seen
    assert (folder / "tour/summary.txt").is_file()
    assert not lab.complaints
