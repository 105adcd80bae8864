"""The emoji's reader: both vendors, one side of the split for an emoji, balanced classes; the flow's loss; memorization."""

import tarfile

import pytest
import tiny
import torch

from vqlib.bundled import emoji_dataset as dataset
from vqlib.bundled import losses, memorization
from vqlib.bundled.subjects import EMOJI, EMOJI_TEST
from vqlib.evaluation.classifier import to_model


@pytest.fixture
def package(tmp_path):
    return tiny.emoji(tmp_path / "emoji.tgz")


def reds(images):
    """Which emoji the forged pictures are."""
    return images[:, 0, 16, 16].tolist()


def test_an_emoji_is_on_one_side_with_its_vendors_and_tones(package):
    train, train_labels = dataset.load("train", package, verify=False)
    test, test_labels = dataset.load("test", package, verify=False)
    assert train.shape == (12 * 8 * 2 + 8 * 2, 3, 32, 32) and train.dtype == torch.uint8
    assert torch.bincount(test_labels).tolist() == [8 if name == "hand" else 4 for name in dataset.CLASSES]
    assert not set(reds(train)) & set(reds(test)) and len(set(reds(test))) == 12 * 2
    for red in set(reds(test)):
        assert set(test[[r == red for r in reds(test)]][:, 2, 16, 16].tolist()) == {0, 100}, "both vendors"
    assert all(red // 10 == label for red, label in zip(reds(train), train_labels.tolist()))
    rest, labels = dataset.load("rest", package, verify=False)
    assert reds(rest) == [120, 120] and labels.tolist() == [-1, -1]


def test_the_split_is_the_same_every_time_and_does_not_depend_on_the_order(package, tmp_path):
    first = dataset.load("test", package, verify=False)[0]
    with tarfile.open(package) as archive:
        archive.extractall(tmp_path / "here", filter="data")
    assert torch.equal(dataset.load("test", tmp_path / "here", verify=False)[0], first)
    assert torch.equal(dataset.load("test", tmp_path / "here" / "package", verify=False)[0], first)


def test_what_is_transparent_is_white_and_the_border_of_a_cell_is_cut(package):
    images, _ = dataset.load("train", package, verify=False)
    assert images[:, :, [0, 31]].min() == 255 and images[..., [0, 31]].min() == 255
    assert images[:, 1, 1:31, 1:31].max() == 0


def test_a_missing_package_is_one_clear_error(package, tmp_path, monkeypatch):
    monkeypatch.delenv("EMOJI_DATASOURCE", raising=False)
    for source in (None, tmp_path / "absent.tgz", tmp_path):
        with pytest.raises(FileNotFoundError, match="`npm pack emoji-datasource@16.0.0`") as caught:
            dataset.load("train", source)
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("EMOJI_DATASOURCE", str(package))
    with pytest.raises(ValueError, match="emoji.json has SHA-256 .* is this emoji-datasource@16.0.0"):
        dataset.load("train")
    with pytest.raises(ValueError, match="split 'validation' is not one of"):
        dataset.load("validation")


def test_balanced_classes_have_their_own_pictures_first_and_moved_ones_after(package):
    images, labels = dataset.load("test", package, verify=False)
    found, classes = dataset.balanced(images, labels, 6)
    assert found.shape == (72, 3, 32, 32) and torch.bincount(classes).tolist() == 12 * [6]
    for label, name in enumerate(dataset.CLASSES):
        own, drawn = images[labels == label], found[classes == label]
        assert all(any(torch.equal(picture, other) for other in own) for picture in drawn[: min(6, len(own))]), name
        assert set(reds(drawn)) <= set(reds(own))
    again, _ = dataset.balanced(images, labels, 6)
    other, _ = dataset.balanced(images, labels, 6, seed=1)
    assert torch.equal(found, again) and not torch.equal(found, other)


def test_the_reference_has_every_class_equally_often(package):
    pictures = EMOJI.load(package, False)
    assert torch.bincount(pictures.test_labels).tolist() == 12 * [EMOJI_TEST]
    assert torch.bincount(pictures.train_labels).tolist() == 12 * [2 * 32], "hands, with a skin tone, are most"
    assert len(pictures.others) == 4, "the emoji of no class, and their mirror images"


def test_the_flow_loss_is_the_squared_error_of_the_velocity_at_the_told_sigma():
    latents, labels = torch.randn(6, 8, 8, 8), torch.arange(6)
    seen = {}

    class Still(torch.nn.Module):
        def forward(self, x, timestep, class_labels):
            seen.update(x=x, sigma=timestep / 1000, labels=class_labels)
            return type("Output", (), {"sample": torch.zeros_like(x)})

    index = torch.arange(6).repeat(50)
    value = losses.flow_loss(latents, labels, 12)(Still(), index, torch.Generator().manual_seed(0))
    sigma = seen["sigma"].view(-1, 1, 1, 1)
    velocity = (seen["x"] - latents[index]) / sigma  # x_σ = x_0 + σ (ε − x_0)
    assert torch.allclose(value, velocity.square().mean(), rtol=1e-4)
    assert 0 < seen["sigma"].min() and seen["sigma"].max() < 1
    dropped = seen["labels"] == 12
    assert 0.04 < dropped.float().mean() < 0.2 and torch.equal(seen["labels"][~dropped], labels[index][~dropped])


def test_products_in_bfloat16_give_nearly_the_same_loss():
    sit = EMOJI.build_transformer()
    torch.nn.init.normal_(sit.proj_out_2.weight, std=0.02)
    loss = losses.flow_loss(torch.randn(8, 8, 8, 8), torch.arange(8), 12)
    index = torch.arange(8)
    plain, narrow = (f(sit, index, torch.Generator().manual_seed(0)) for f in (loss, losses.in_bfloat16(loss)))
    assert narrow.dtype == torch.float32 and plain.item() == pytest.approx(narrow.item(), rel=0.02)


def test_a_picture_of_the_training_is_told_from_a_new_one():
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(0, 256, (5000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    new = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=generator)
    generated = torch.cat([train[4990:], new[:10].flip(2)])
    found = {"pixels": tuple(memorization.in_pixels(images, train) for images in (generated, new))}
    assert found["pixels"][0].index[:10].tolist() == list(range(4990, 5000))
    assert found["pixels"][0].distance[:10].max() < 1 < 80 < found["pixels"][0].distance[10:].min()
    table = memorization.table(found)
    assert table["pictures"].tolist() == ["generated", "test"]
    assert table.iloc[0, -1] >= 0.5 and table.iloc[1, -1] == pytest.approx(0.05)
    expected = (to_model(new[:1]) - to_model(train)).square().mean((1, 2, 3)).sqrt().min() * 127.5
    assert found["pixels"][1].distance[0] == pytest.approx(expected.item(), rel=1e-3)


def test_jitter_leaves_white_white_and_follows_its_generator():
    images = to_model(torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8))
    first, again, other = (losses.jitter(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == images.shape and first.min() >= -1 and first.max() <= 1
    white = torch.ones(4, 3, 32, 32)
    assert torch.allclose(losses.jitter(white, torch.Generator().manual_seed(0)), white)
