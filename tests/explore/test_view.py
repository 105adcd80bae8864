"""Views change with their settings, cancel what is overtaken, remember what was seen, and do without widgets."""

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from panel import PATIENCE, Panel

from vqlib.explore.drawing import Drawing
from vqlib.explore.view import Control, Picture, View
from vqlib.figures.styles import VENUES, new_figure


class Numbers(View):
    """Shows its number; holds on until it may go on, so that a test decides when a computation ends."""

    name = "numbers"

    def __init__(self, out):
        self.made, self.begun, self.go = [], threading.Event(), threading.Event()
        self.go.set()
        super().__init__([Control("number", "number", tuple(range(10)), 0)], out)

    def prepare(self, settings, task):
        self.begun.set()
        while not self.go.wait(0.01) and not task.cancelled:
            pass
        if task.cancelled:
            return None
        self.made.append(settings["number"])
        if settings["number"] == 9:
            raise ValueError("nine is too many")
        return settings["number"]

    def picture(self, settings, prepared):
        data = pd.DataFrame({"number": [prepared]})
        return Picture(partial(self._plot, prepared), f"number {prepared}", data, data)

    def _plot(self, number, titled):
        figure = new_figure(1.0)
        figure.subplots().plot([0, number])
        return figure


def test_a_change_shows_a_new_picture_and_going_back_computes_nothing(tmp_path):
    view = Numbers(tmp_path)
    panel = Panel(view)
    first = view.still()
    view.set(number=3)
    view.wait(PATIENCE)
    assert view.shown.caption == "number 3" and view.shown.png != first.png
    view.set(number=0)
    assert panel.seen[-1] == (first.png, "number 0")  # at once, without waiting
    assert view.made == [0, 3] and panel.done == 2


def test_a_newer_request_cancels_the_one_that_runs_and_drops_those_that_wait(tmp_path):
    view = Numbers(tmp_path)
    view.go.clear()
    view.set(number=1)
    assert view.begun.wait(PATIENCE)
    for number in (2, 3, 4):
        view.set(number=number)
    view.go.set()
    view.wait(PATIENCE)
    assert view.made == [4] and view.shown.caption == "number 4"


def test_what_goes_wrong_is_shown_and_raised_and_the_next_request_works(tmp_path):
    view = Numbers(tmp_path)
    panel = Panel(view)
    view.set(number=9)
    with pytest.raises(ValueError, match="nine is too many"):
        view.wait(PATIENCE)
    assert panel.seen[-1] == (None, "ValueError: nine is too many")
    view.set(number=1)
    view.wait(PATIENCE)
    assert view.shown.caption == "number 1"


def test_unknown_settings_and_values_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no setting 'nmber'; there are number"):
        Numbers(tmp_path).set(nmber=1)
    with pytest.raises(ValueError, match=r"number=11 is not one of \[0, 1"):
        Numbers(tmp_path).set(number=11)


def test_export_writes_what_is_shown_at_the_venues_width(tmp_path):
    view = Numbers(tmp_path / "new")
    view.set(number=7)
    view.wait(PATIENCE)
    paths = view.export("AAAI", columns=2)
    assert paths["csv"].read_text() == paths["table.csv"].read_text() == "number\n7\n"
    points = VENUES["AAAI"].text * 72
    assert f"MediaBox [ 0 0 {points:g} ".encode() in paths["pdf"].read_bytes()
    told = []
    view.exported("no such venue", 1, told.append)
    view.wait(PATIENCE)
    assert "no such venue" in told[0]


def test_an_export_has_the_name_of_what_is_shown_and_not_of_what_is_still_computed(tmp_path):
    view = Numbers(tmp_path)
    view.still()
    view.go.clear()
    view.set(number=2)
    assert view.begun.wait(PATIENCE)
    early = view.export()
    view.go.set()
    view.wait(PATIENCE)
    late = view.export()
    assert early["csv"].name == "numbers_notebook_0.csv" and early["csv"].read_text() == "number\n0\n"
    assert late["csv"].name == "numbers_notebook_2.csv" and late["csv"].read_text() == "number\n2\n"


def test_one_picture_is_computed_at_a_time(tmp_path):
    class Counted(Numbers):
        together, most = 0, 0

        def prepare(self, settings, task):
            self.together += 1
            self.most = max(self.most, self.together)
            try:
                return super().prepare(settings, task)
            finally:
                self.together -= 1

    view = Counted(tmp_path)
    view.go.clear()
    view.set(number=1)
    assert view.begun.wait(PATIENCE)
    threading.Timer(0.1, view.go.set).start()
    assert view.still().caption == "number 1"
    view.wait(PATIENCE)
    assert view.made == [1, 1] and view.most == 1


def test_only_the_thread_that_made_it_draws():
    drawing, threads = Drawing(), []
    thread = threading.Thread(target=lambda: drawing.call(lambda: threads.append(threading.current_thread())))
    thread.start()
    thread.join()
    assert not threads
    drawing.wait(lambda: bool(threads), PATIENCE)
    assert threads == [threading.current_thread()]
    with pytest.raises(TimeoutError):
        drawing.wait(lambda: False, 0.01)


def test_without_ipywidgets_there_is_a_still_figure(tmp_path):
    script = (
        "import sys; sys.modules['ipywidgets'] = None\n"
        "from test_view import Numbers\n"
        f"Numbers({str(tmp_path)!r})._ipython_display_()\n"
    )
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "number 0\n" in done.stdout and "sliders and buttons need ipywidgets" in done.stdout
