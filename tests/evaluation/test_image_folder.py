"""A folder's images are the right files, in the right order, with the right pixels, or are refused by name."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from vqlib.evaluation.image_folder import folder_batches, image_files, read_image


@pytest.fixture
def gray():
    return np.random.default_rng(0).integers(0, 256, (6, 5), dtype=np.uint8)


def saved(folder, name, array, mode=None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(path)
    return path


def rgb(gray):
    return torch.from_numpy(gray).expand(3, -1, -1)


def test_every_plain_form_of_one_picture_gives_the_same_pixels(tmp_path, gray):
    color = np.stack([gray] * 3, axis=2)
    paths = [
        saved(tmp_path, "l.png", gray),
        saved(tmp_path, "rgb.png", color),
        saved(tmp_path, "16.png", gray.astype(np.uint16) * 257),
        saved(tmp_path, "rgba.png", np.dstack([color, np.full_like(gray, 255)])),
        saved(tmp_path, "la.png", np.dstack([gray, np.full_like(gray, 255)]), "LA"),
        saved(tmp_path, "l.bmp", gray),
    ]
    palette = Image.fromarray(gray).convert("P")
    palette.save(tmp_path / "p.png")
    for path in [*paths, tmp_path / "p.png"]:
        assert torch.equal(read_image(path), rgb(gray)), path.name


def test_16_bits_are_scaled_and_rounded(tmp_path):
    wide = np.array([[0, 128, 129, 65535, 65407, 32768]], dtype=np.uint16)
    assert read_image(saved(tmp_path, "w.png", wide))[0].tolist() == [[0, 0, 1, 255, 255, 128]]


def test_bilevel_is_black_and_white(tmp_path):
    Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1").save(tmp_path / "1.png")
    assert read_image(tmp_path / "1.png")[0].tolist() == [[0, 255]]


def test_what_eight_bits_do_not_hold_is_refused_by_name(tmp_path, gray):
    color = np.stack([gray] * 3, axis=2)
    clear = np.full_like(gray, 255)
    clear[0, 0] = 7
    for name, array, mode, message in (
        ("alpha.png", np.dstack([color, clear]), None, r"alpha.png has transparent pixels \(alpha from 7\)"),
        ("cmyk.jpg", np.dstack([color, gray]), "CMYK", "cmyk.jpg has mode 'CMYK'"),
    ):
        path = saved(tmp_path, name, array, mode)
        with pytest.raises(ValueError, match=message):
            read_image(path)
    indexed = Image.fromarray(gray).convert("P")
    indexed.save(tmp_path / "hole.png", transparency=int(np.array(indexed)[0, 0]))
    with pytest.raises(ValueError, match="hole.png has transparent pixels"):
        read_image(tmp_path / "hole.png")
    frames = [Image.fromarray(gray), Image.fromarray(255 - gray)]
    frames[0].save(tmp_path / "film.png", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="film.png holds 2 frames"):
        read_image(tmp_path / "film.png")


def test_a_damaged_file_is_named(tmp_path, gray):
    path = saved(tmp_path, "torn.png", np.tile(gray, (40, 40)))
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match="torn.png cannot be read as an image"):
        read_image(path)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="text.png cannot be read as an image"):
        read_image(tmp_path / "text.png")


def test_names_are_in_the_order_of_their_numbers(tmp_path, gray):
    for name in ("10.png", "9.png", "b/2.jpg", "b/11.png", "a2-10.png", "a2-9.png", "a10-1.PNG"):
        saved(tmp_path, name, gray)
    found = [path.relative_to(tmp_path).as_posix() for path in image_files(tmp_path)]
    assert found == ["9.png", "10.png", "a2-9.png", "a2-10.png", "a10-1.PNG", "b/2.jpg", "b/11.png"]


@pytest.mark.parametrize("twin", ["01.png", "1.jpg"])
def test_two_files_of_one_number_are_refused_where_their_order_counts(tmp_path, gray, twin):
    saved(tmp_path, "1.png", gray), saved(tmp_path, twin, gray)
    assert len(image_files(tmp_path)) == 2
    with pytest.raises(ValueError, match="have one number: the order in which labels belong"):
        list(folder_batches(tmp_path, 5, ordered=True))


def test_hidden_and_foreign_files_are_no_images_and_other_kinds_of_images_are_refused(tmp_path, gray):
    saved(tmp_path, "0.png", gray)
    for name in (".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/0.png", "._1.png", ".hidden.png"):
        saved(tmp_path, name, gray)
    (tmp_path / "__MACOSX/._0.png").write_bytes(b"\0\5\26\7")
    (tmp_path / "labels.json").write_text("{}")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in image_files(tmp_path)] == ["0.png"]
    saved(tmp_path, "1.tiff", gray)
    with pytest.raises(ValueError, match="1.tiff is an image that is not read here"):
        image_files(tmp_path)


def png(path, pixels, **chunks):
    """A PNG of 16 bits a channel, [H, W] or [H, W, 3 or 4], which Pillow cannot write."""
    kind = {2: 0, 3: 2, 4: 6}[pixels.ndim if pixels.ndim == 2 else pixels.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = {"IHDR": struct.pack(">IIBBBBB", *pixels.shape[1::-1], 16, kind, 0, 0, 0), **chunks}
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with path.open("ab") as file:
        for name, data in (parts | {"IDAT": zlib.compress(rows), "IEND": b""}).items():
            body = name.encode() + data
            file.write(struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body)))
    return path


def test_16_bits_of_color_or_with_a_transparent_gray_are_refused(tmp_path, gray):
    wide = gray.astype(np.uint16) * 257
    assert torch.equal(read_image(png(tmp_path / "gray.png", wide)), rgb(gray))
    color, clear = np.dstack([wide] * 3), struct.pack(">H", int(wide[0, 0]))
    alpha = np.dstack([wide] * 3 + [np.full_like(wide, 65535)])
    for path in (
        png(tmp_path / "color.png", color),
        png(tmp_path / "rgba.png", alpha),
        png(tmp_path / "hole.png", wide, tRNS=clear),
    ):
        with pytest.raises(ValueError, match=f"{path.name} has 16 bits a channel and color or transparency"):
            read_image(path)


@pytest.mark.parametrize("orientation, turned", [(3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1))])
def test_a_photograph_lies_as_its_exif_says(tmp_path, gray, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gray).save(tmp_path / "photo.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "photo.png"), rgb(turned(gray).copy()))


def test_a_link_that_is_not_followed_is_named(tmp_path, gray):
    saved(tmp_path / "elsewhere", "0.png", gray)
    folder = tmp_path / "images"
    saved(folder, "0.png", gray)
    (folder / "1.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    assert [path.name for path in image_files(folder)] == ["0.png", "1.png"]
    for name, target in (("2.png", "absent.png"), ("more", "elsewhere")):
        (folder / name).symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=f"{name} is a link to .*{target}, which is not followed"):
            image_files(folder)
        (folder / name).unlink()


def test_names_whose_order_hangs_on_capitals_are_refused_where_it_counts(tmp_path, gray):
    for name in ("b1.png", "C2.png"):
        saved(tmp_path, name, gray)
    assert [path.name for path in image_files(tmp_path)] == ["C2.png", "b1.png"]
    with pytest.raises(ValueError, match="C2.png and .*b1.png are in another order without capitals"):
        image_files(tmp_path, ordered=True)
    (tmp_path / "C2.png").rename(tmp_path / "B1.png")
    with pytest.raises(ValueError, match="B1.png and .*b1.png are in another order without capitals"):
        image_files(tmp_path, ordered=True)


@pytest.mark.parametrize("name", ["x²3.png", "٣.png"])
def test_digits_of_other_scripts_are_letters(tmp_path, gray, name):
    saved(tmp_path, name, gray)
    assert [path.name for path in image_files(tmp_path, ordered=True)] == [name]


def test_images_of_kinds_unknown_here_are_refused_too(tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(b"")
    with pytest.raises(ValueError, match="IMG_1.HEIC is an image that is not read here"):
        image_files(tmp_path)
