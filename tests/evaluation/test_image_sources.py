"""Every source of images gives the same uint8 blocks; what is not plainly an 8-bit image is refused."""

import io

from vqlib.system import compat  # noqa: F401, isort: skip, first: torchvision beside a CPU torch

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import to_pil_image

from vqlib.evaluation.image_sources import count_images, fit_channels, image_blocks


@pytest.fixture
def images():
    return torch.randint(0, 256, (23, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def whole(source, block=5):
    return torch.cat(list(image_blocks(source, block)))


def sources(images, folder):
    (folder / "inner").mkdir(parents=True)
    for i, image in enumerate(images):
        to_pil_image(image).save(folder / ("inner" if i > 10 else ".") / f"{'z' if i > 10 else 'a'}{i:03}.png")
    archive = folder.parent / "images.npz"
    np.savez_compressed(archive, images.permute(0, 2, 3, 1).numpy())
    return {
        "tensor": images,
        "numpy": images.permute(0, 2, 3, 1).numpy(),
        "dataset of tuples": TensorDataset(images, torch.zeros(23)),
        "loader of tuples": DataLoader(TensorDataset(images, torch.zeros(23)), batch_size=4),
        "iterator": iter(images.split([1, 2, 20])),
        "list of batches": list(images.split(7)),
        "list of images": list(images),
        "npz": archive,
        "folder": folder,
    }


def test_every_source_gives_the_same_images(images, tmp_path):
    for name, source in sources(images, tmp_path / "folder").items():
        found = whole(source)
        if name == "folder":  # sorted by path: "a…" of the outer folder lies before "inner/"
            assert found.shape == images.shape
        assert torch.equal(found, images), name


def test_counts_are_known_without_reading_where_they_can_be(images, tmp_path):
    known = {name: count_images(source) for name, source in sources(images, tmp_path / "folder").items()}
    assert known.pop("iterator") is None and known.pop("loader of tuples") is None
    assert set(known.values()) == {23}


def test_blocks_are_full_whatever_the_batches_were(images):
    assert [len(block) for block in image_blocks(iter(images.split([1, 2, 20])), 5)] == [5, 5, 5, 5, 3]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.float() / 255, "images 0 … 4 are torch.float32; metrics need uint8"),
        (lambda x: x.float() * float("nan"), "torch.float32 and contain NaN"),
        (lambda x: x[:, :2], r"\(5, 2, 8, 6\), expected \[B, C, H, W\] with C = 1 or 3"),
        (lambda x: x[0], r"shape \(3, 8, 6\), expected \[N, C, H, W\]"),
        (lambda x: x[:0], "no images in Tensor"),
        (lambda x: iter([x, x[:, :, :7]]), r"images 23 … 45 are \(3, 7, 6\), the images before are \(3, 8, 6\)"),
        (lambda x: 5, "images of type int"),
        (lambda x: {"images": x}, "images of type dict"),
        (lambda x: iter([x, None]), "images from 23 on are NoneType"),
        (lambda x: iter([x, torch.tensor(3)]), r"images from 23 on are torch.int64 \(\)"),
        (
            lambda x: [*x[:3], x[3, :, :7]],
            r"image 3 is torch.uint8 \(3, 7, 6\), the images before are torch.uint8 \(3, 8, 6\)",
        ),
        (lambda x: [*x[:3], x[3] > 9], r"image 3 is torch.bool \(3, 8, 6\)"),
        (lambda x: [x[0].numpy()], r"image 0 is uint8 \(3, 8, 6\), expected a uint8 tensor"),
        (lambda x: x.numpy(), r"images 0 … 4 have shape \(5, 6, 3, 8\), expected"),
        (lambda x: x.numpy().astype(object), "images 0 … 4 are object; metrics need uint8"),
        (lambda x: x.numpy().astype(">u2"), "images 0 … 4 are >u2; metrics need uint8"),
        (lambda x: (x / 255).to(torch.uint8), "no pixel of 23 images is above 1; pixels run from 0 to 255"),
        (lambda x: x[:, :, :0], r"shape \(5, 3, 0, 6\)"),
    ],
)
def test_what_is_not_an_image_is_refused(images, change, message):
    with pytest.raises(ValueError, match=message):
        whole(change(images))


def test_files_that_hold_no_images_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match="neither a folder of images nor an .npz"):
        whole(tmp_path / "absent.npz")
    (tmp_path / "torn.npz").write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match="torn.npz holds no readable images"):
        whole(tmp_path / "torn.npz")
    np.savez(tmp_path / "float.npz", np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match="'arr_0' is float64"):
        whole(tmp_path / "float.npz")
    to_pil_image(images[0]).save(tmp_path / "a.png")
    to_pil_image(images[0, :, :4]).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b.png is \(3, 4, 6\), the images before are \(3, 8, 6\)"):
        whole(tmp_path)


def test_an_npz_that_asks_for_pickle_is_refused(tmp_path):
    stream = io.BytesIO()
    np.savez(stream, np.array([{"a": 1}], dtype=object))
    (tmp_path / "objects.npz").write_bytes(stream.getvalue())
    with pytest.raises(ValueError, match="'arr_0' is object"):
        whole(tmp_path / "objects.npz")


def test_channels_are_repeated_or_dropped_but_color_is_never_made_grey(images):
    grey = images[:, :1]
    assert torch.equal(fit_channels(grey, 3), grey.repeat(1, 3, 1, 1))
    assert torch.equal(fit_channels(grey.repeat(1, 3, 1, 1), 1), grey)
    with pytest.raises(ValueError, match="images are in color"):
        fit_channels(images, 1)


def test_a_damaged_npz_is_named_before_or_while_it_is_read(images, tmp_path):
    path = tmp_path / "samples.npz"
    np.savez_compressed(path, images.permute(0, 2, 3, 1).numpy())
    whole_file = path.read_bytes()
    for first in range(80, len(whole_file) - 200, 97):
        path.write_bytes(
            whole_file[:first] + bytes(255 - b for b in whole_file[first : first + 5]) + whole_file[first + 5 :]
        )
        with pytest.raises(ValueError, match="samples.npz holds no readable images"):
            whole(path)
