"""Grids show the pixels they are given, below the right labels, at the exact width."""

import numpy as np
import pytest
import torch

from vqlib.figures.grids import SHOWN_PIXELS, difference_map, image_grid
from vqlib.figures.styles import METHOD_COLORS, style


def images(count=3, channels=1, seed=0):
    return torch.randint(
        0, 256, (count, channels, 32, 32), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts] + [text.get_text() for text in figure.texts]


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_is_there_enlarged_by_a_whole_factor(channels):
    first, second = images(channels=channels), images(channels=channels, seed=1)
    with style("AAAI"):
        figure = image_grid({"full precision": first, "VQ4DiT, 2 bits": second}, ["a", "b", "c"])
    canvas = np.asarray(figure.axes[0].images[0].get_array())
    side, factor = SHOWN_PIXELS, SHOWN_PIXELS // 32
    gap = (canvas.shape[1] - 3 * side) // 2
    shown = canvas[side + gap : 2 * side + gap : factor, side + gap : 2 * side + gap : factor]  # row 1, column 1
    assert torch.equal(torch.from_numpy(shown.copy()), second[1].expand(3, -1, -1).permute(1, 2, 0))
    assert (canvas[side : side + gap] == 255).all()


def test_labels_and_width():
    with style("AAAI") as venue:
        figure = image_grid(
            {"full precision": images(), "k-means only, 2 bits": images()}, ["bag", "coat", "shirt"], title="claim"
        )
    assert figure.get_size_inches()[0] == venue.column
    assert {"bag", "coat", "shirt", "claim", "full\nprecision"} <= set(texts(figure))
    assert texts(figure)[1] == "k-means only\n2 bits"
    assert METHOD_COLORS["k-means"].lower() in [_hex(patch) for patch in figure.axes[0].patches]


def _hex(patch):
    return "#" + "".join(f"{round(255 * value):02x}" for value in patch.get_facecolor()[:3])


@pytest.mark.parametrize("venue, count", [("AAAI", 10), ("AAAI", 2), ("notebook", 8)])
def test_nothing_is_cut_off(venue, count):
    names = [f"ankle boot {i}" for i in range(count)]
    with style(venue):
        figure = image_grid(
            {"full precision": images(count), "VQ4DiT, best of all, 2 bits": images(count)}, names, title="claim"
        )
        figure.canvas.draw()
        for text in [*figure.axes[0].texts, *figure.texts]:
            box = text.get_window_extent()
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, (
                text.get_text()
            )


@pytest.mark.parametrize("venue", ["AAAI", "ICML", "notebook"])
def test_the_label_of_the_difference_fits_beside_its_bar(venue):
    with style(venue):
        figure = difference_map(
            images(8), images(8, seed=1), ("full precision", "k-means only, 2 bits"), list("abcdefgh")
        )
        figure.canvas.draw()
        label = next(text for axis in figure.axes for text in axis.texts if "pixel values" in text.get_text())
        assert label.get_window_extent().x1 <= figure.bbox.x1 + 1


def test_difference_map_is_black_where_images_agree():
    other = images().clone()
    other[1] = 255 - other[1]
    figure = difference_map(images(), other, ("full precision", "VQ4DiT"))
    canvas = np.asarray(figure.axes[0].images[0].get_array())[-SHOWN_PIXELS:]
    gap = (canvas.shape[1] - 3 * SHOWN_PIXELS) // 2
    same, changed = canvas[:, :SHOWN_PIXELS], canvas[:, SHOWN_PIXELS + gap : 2 * SHOWN_PIXELS + gap]
    assert same.max() <= 4 and changed.mean() > 60
    assert "difference" in texts(figure)


def test_bad_rows_are_refused_with_their_numbers():
    with pytest.raises(ValueError, match=r"row 'b' is \(2, 1, 32, 32\) but row 'a' is \(3, 1, 32, 32\)"):
        image_grid({"a": images(3), "b": images(2)})
    with pytest.raises(ValueError, match="row 'a' is torch.float32"):
        image_grid({"a": images().float()})
    with pytest.raises(ValueError, match="2 column labels for 3 images"):
        image_grid({"a": images()}, ["x", "y"])
    with pytest.raises(ValueError, match="no rows"):
        image_grid({})


def test_labels_may_be_empty_and_names_must_differ():
    image_grid({"": images(), "b": images()}, ["", "bag", ""])
    for names in (("a", "a"), ("a", "difference")):
        with pytest.raises(ValueError, match=f"rows are named a, {names[1]} and difference: three different names"):
            difference_map(images(), images(seed=1), names)
    with pytest.raises(ValueError, match=r"row 'a' is \(0, 1, 32, 32\): there is no image to show"):
        image_grid({"a": images()[:0]})


def test_the_end_of_the_bar_is_the_largest_difference():
    first = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    second = first.clone()
    second[0, :, 3, 3] = torch.tensor([1, 1, 2])
    figure = difference_map(first, second, ("a", "b"))
    assert "1.33" in [label.get_text() for axis in figure.axes for label in axis.get_xticklabels()]
