"""A log axis says where it is, however little of it is seen."""

import pytest

from vqlib.figures.layout import log_scale
from vqlib.figures.styles import new_figure


@pytest.mark.parametrize("low, high", [(0.93, 1.9), (1.1, 1.6), (0.3, 2.5), (0.4, 30.0), (1.0, 900.0)])
def test_at_least_two_ticks_are_seen(low, high):
    axis = new_figure(1.0).subplots()
    axis.plot([0, 1], [low, high])
    log_scale(axis, "y")
    axis.figure.canvas.draw()
    bottom, top = axis.get_ylim()
    seen = [label.get_text() for tick, label in zip(axis.get_yticks(), axis.get_yticklabels()) if bottom <= tick <= top]
    assert len(seen) >= 2 and all(seen) and len(seen) == len(set(seen)) <= 10
