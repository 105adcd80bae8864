"""A calibration that would run for hours: paused, resumed and stopped by its buttons, and taken up again."""

import re

from tests.browser.conftest import write_cells
from tests.browser.lab import Explorer

SETUP = """
import tiny, vqlib
from vqlib import explore
pipe = tiny.pipeline()

def calibration():
    student = vqlib.quantize(pipe.transformer, vqlib.VQConfig(k=8, d=4, candidates=2))
    settings = vqlib.CalibrationConfig(iterations=100_000, batch_size=2, steps=4)
    return vqlib.calibrate(pipe, student, settings, out="live")
"""
FIRST = "view = explore.run(calibration())\nview"
WAIT = "packed = await view.finished()\nprint('packed at', view.records[-1].iteration)"
AGAIN = "again = explore.run(calibration())\nagain"  # nothing waits for it: the kernel is free


def iteration(explorer):
    return int(re.search(r"iteration (\d+) of", explorer.caption)[1])


def pause_and_resume(lab, explorer):
    explorer.until("^running: iteration .* left$")
    explorer.until_picture_is_not(explorer.picture)
    explorer.button("Pause").click()
    explorer.until("^paused")
    held = iteration(explorer)
    lab.page.wait_for_timeout(1500)
    assert iteration(explorer) == held
    explorer.button("Resume").click()
    explorer.until("^running")
    assert iteration(explorer) > held


def test_buttons_hold_and_end_a_run_and_it_goes_on_later(lab, folder):
    lab.open(write_cells(folder / "live.ipynb", SETUP, FIRST, WAIT, AGAIN).name)
    lab.run_all(wait=False)
    first = Explorer(lab, "run")
    pause_and_resume(lab, first)
    assert lab.kernel == "busy"  # with the cell that waits for the run
    first.button("Stop").click()
    lab.page.get_by_text("packed at ").wait_for()
    first.until("^stopped")
    ended = iteration(first)
    lab.page.locator(".vqlib-run").nth(1).wait_for()
    second = Explorer(lab, "run")
    pause_and_resume(lab, second)
    assert lab.kernel == "idle" and iteration(second) > ended
    second.button("Stop").click()
    second.until("^stopped")
    lab.screenshot("live_stopped", second.button("Export"))
    lab.close()
    assert not lab.complaints
