"""References: made, stored, read back, ADM's files, and what is refused."""

import json

from vqlib.system import compat  # noqa: F401, isort: skip, first: torchvision beside a CPU torch

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vqlib.evaluation.classifier import SmallClassifier
from vqlib.evaluation.extractors import FashionExtractor, load_extractor
from vqlib.evaluation.frechet import frechet_from_statistics
from vqlib.evaluation.references import ABOUT, STORED, Reference, load_reference, make_reference, resolve


def classifier(folder, seed):
    torch.manual_seed(seed)
    path = folder / f"classifier-{seed}.safetensors"
    save_file(SmallClassifier(1, 10, FashionExtractor.WIDTHS).state_dict(), path)
    return load_extractor("fashion", path)


@pytest.fixture
def extractor(tmp_path):
    return classifier(tmp_path, 0)


def pictures(n, seed=0):
    return torch.randint(0, 256, (n, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_a_stored_reference_comes_back_exactly(extractor, tmp_path):
    made = make_reference(pictures(40), extractor, tmp_path / "ref.safetensors", name="test set")
    read = load_reference(tmp_path / "ref.safetensors")
    for name, value in vars(made).items():
        other = getattr(read, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    assert read.mean.dtype == torch.float64 and read.features.shape == (40, 128) and read.size == (32, 32)
    with safe_open(tmp_path / "ref.safetensors", "pt") as file:
        about = json.loads(file.metadata()[ABOUT])
        assert file.get_tensor("features").dtype == torch.float16
    assert about["extractor"] == "fashion" and about["count"] == 40 and len(about["images_sha256"]) == 64


def test_statistics_are_of_all_images_and_features_of_a_seeded_subset(extractor):
    found = extractor(pictures(40)).features
    made = make_reference(iter(pictures(40).split(9)), extractor, keep=10, seed=3)
    np.testing.assert_allclose(made.mean, found.double().mean(0), rtol=1e-9)
    np.testing.assert_allclose(made.covariance, np.cov(found.double().numpy(), rowvar=False), atol=1e-12)
    assert made.count == 40 and made.features.shape == (10, 128)
    kept = [int((found.half().float() == row).all(dim=1).nonzero()[0]) for row in made.features]
    assert kept == sorted(set(kept)) and kept != list(range(10))
    assert torch.equal(made.features, make_reference(pictures(40), extractor, keep=10, seed=3).features)
    assert make_reference(pictures(40), extractor, keep=0).features is None


def test_the_bundled_name_points_into_the_bundled_model():
    file = "reference-fashion-mnist-test.safetensors"
    assert STORED["fashion-mnist-test"].parts[-3:] == ("data", "dit-mini-fashion", file)
    with pytest.raises(FileNotFoundError, match="known names: fashion-mnist-test"):
        load_reference("no-such-reference")


def test_damaged_and_foreign_files_are_refused(extractor, tmp_path):
    path = tmp_path / "ref.safetensors"
    make_reference(pictures(20), extractor, path)
    whole = path.read_bytes()
    for keep in (0, 5, 200, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="ref.safetensors is not a readable reference"):
            load_reference(path)
    save_file({"mean": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="is not a readable reference"):
        load_reference(path)
    about = {
        "name": "x",
        "extractor": "fashion",
        "extractor_sha256": None,
        "count": 9,
        "size": None,
        "images_sha256": None,
    }
    save_file({"mean": torch.zeros(3), "covariance": torch.zeros(3, 3)}, path, {ABOUT: json.dumps(about)})
    with pytest.raises(ValueError, match=r"ref.safetensors .* mean has shape \[3\], extractor 'fashion' needs \[128\]"):
        load_reference(path)


def test_another_extractor_or_other_weights_are_refused(extractor, tmp_path):
    made = make_reference(pictures(20), extractor)
    with pytest.raises(ValueError, match="other weights of 'fashion'"):
        resolve(made, classifier(tmp_path, 1))
    foreign = Reference("adm", "inception", torch.zeros(2048), torch.zeros(2048, 2048))
    with pytest.raises(ValueError, match="made with extractor 'inception', not 'fashion'"):
        resolve(foreign, extractor)
    with pytest.raises(ValueError, match="needs extractor=…, one of fashion"):
        resolve(pictures(20))


def test_a_folder_a_tensor_and_an_npz_of_images_are_made_on_the_spot(extractor, tmp_path):
    from torchvision.transforms.functional import to_pil_image

    images = pictures(20)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        to_pil_image(image).save(tmp_path / "folder" / f"{i:03}.png")
    np.savez(tmp_path / "samples.npz", images.permute(0, 2, 3, 1).numpy())
    expected = make_reference(images, extractor)
    for source in (images, tmp_path / "folder", tmp_path / "samples.npz"):
        found, _ = resolve(source, extractor)
        # a folder is read as RGB, so its hash differs; the features do not
        assert torch.equal(found.mean, expected.mean) and found.count == 20


def test_adms_npz_gives_statistics_and_the_size_of_its_images(tmp_path):
    generator = np.random.default_rng(0)
    statistics = {
        "mu": generator.normal(size=2048),
        "sigma": np.eye(2048, dtype=np.float32),
        "mu_s": generator.normal(size=2023),
        "sigma_s": np.eye(2023, dtype=np.float32),
    }
    np.savez(tmp_path / "adm.npz", np.zeros((4, 64, 64, 3), np.uint8), **statistics)
    found = load_reference(tmp_path / "adm.npz")
    assert found.extractor == "inception" and found.size == (64, 64) and found.count is None and found.features is None
    np.testing.assert_array_equal(found.mean, statistics["mu"])
    assert found.covariance.dtype == torch.float64 and found.spatial_mean.shape == (2023,)
    mu, sigma = found.mean[:50], found.covariance[:50, :50]
    assert frechet_from_statistics(mu, sigma, mu + 1, sigma) == pytest.approx(50.0)
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(2048))
    with pytest.raises(ValueError, match="holds mu; a reference needs mu and sigma"):
        load_reference(tmp_path / "wrong.npz")


@pytest.mark.parametrize("damage", ["cut", "flip", "objects"])
def test_a_damaged_adm_reference_is_named(tmp_path, damage):
    path = tmp_path / "reference.npz"
    mean = np.array([{}], dtype=object) if damage == "objects" else np.random.default_rng(0).normal(size=400)
    np.savez_compressed(path, mu=mean, sigma=np.eye(400))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[200:230] = bytes(30)
    path.write_bytes(data[:-60] if damage == "cut" else data)
    with pytest.raises(ValueError, match="reference.npz"):
        load_reference(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mean": torch.zeros(64)}, r"mean has shape \[64\], extractor 'fashion' needs \[128\]"),
        ({"covariance": torch.zeros(128)}, r"covariance has shape \[128\], .* needs \[128, 128\]"),
        ({"covariance": torch.full((128, 128), float("nan"))}, "covariance contains NaN"),
        ({"features": torch.full((5, 128), float("inf"))}, "features contains NaN or infinity"),
        ({"features": torch.zeros(5, 64)}, r"features has shape \[64\]"),
        ({"spatial_mean": torch.zeros(7)}, r"spatial_covariance has shape None, .* needs \[7, 7\]"),
        ({"extractor": "vgg"}, "extractor 'vgg' is not one of fashion, emoji, inception"),
    ],
)
def test_statistics_that_cannot_be_of_this_extractor_are_refused_however_they_come(change, message):
    values = {"extractor": "fashion", "mean": torch.zeros(128), "covariance": torch.eye(128)}
    assert Reference("ours", **values).features is None
    with pytest.raises(ValueError, match=f"reference 'ours': {message}"):
        Reference("ours", **(values | change))


def test_seeds_and_counts_of_kept_features_are_integers(extractor):
    with pytest.raises(ValueError, match="keep=-1 features"):
        make_reference(pictures(20), extractor, keep=-1)
    with pytest.raises(ValueError, match="seed=0.5 is not an integer"):
        make_reference(pictures(20), extractor, seed=0.5)
