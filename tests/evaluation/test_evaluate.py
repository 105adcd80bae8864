"""Metrics: known answers, parity with torch-fidelity end to end, names, counts, and what is refused."""

import importlib
import json

from vqlib.system import compat  # noqa: F401, isort: skip, first: torchvision beside a CPU torch

import numpy as np
import pytest
import torch
import torch_fidelity
from safetensors.torch import save_file
from torch.utils.data import Dataset
from torch_fidelity.metric_prc import prc_features_to_metric

from vqlib.evaluation.classifier import SmallClassifier
from vqlib.evaluation.evaluate import Metrics, evaluate, inception_score, precision_recall
from vqlib.evaluation.extractors import FashionExtractor, load_extractor
from vqlib.evaluation.references import make_reference


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "classifier.safetensors"
    save_file(SmallClassifier(1, 10, FashionExtractor.WIDTHS).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def extractor(weights):
    return load_extractor("fashion", weights)


@pytest.fixture(scope="module")
def reference(extractor):
    return make_reference(pictures(180, seed=9), extractor, name="noise")


def pictures(n, seed=0, top=256):
    return torch.randint(0, top, (n, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def run(images, reference, extractor, **settings):
    return evaluate(images, reference, extractor, cache=None, **settings)


class Pictures(Dataset):
    """What torch-fidelity takes: uint8 [C, H, W], no tuples."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_every_metric_agrees_with_torch_fidelity(weights, extractor, reference):
    images, real = pictures(150, top=200), pictures(180, seed=9)
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(images),
        input2=Pictures(real),
        feature_extractor="fashion",
        feature_extractor_weights_path=str(weights),
        fid=True,
        isc=True,
        prc=True,
        isc_splits=1,
        samples_shuffle=False,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    ours = run(images, reference, extractor)
    assert ours.fd == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)  # theirs: the mean in float32
    assert ours.inception_score == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours.precision == pytest.approx(theirs["precision"], abs=1.5 / 150)  # features kept in half precision
    assert ours.recall == pytest.approx(theirs["recall"], abs=1.5 / 180)


def test_precision_and_recall_agree_with_torch_fidelity_on_the_same_features(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 8, generator=generator), torch.randn(250, 8, generator=generator) * 1.2
    theirs = prc_features_to_metric(a, b, save_cpu_ram=False, verbose=False)
    assert 0.1 < theirs["precision"] < 1.0
    monkeypatch.setattr(importlib.import_module("vqlib.evaluation.evaluate"), "TILE", 300 * 17)  # many tiles
    assert precision_recall(a, b) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-5)


def test_precision_and_recall_of_disjoint_equal_and_nested_sets():
    spread = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    assert precision_recall(spread, spread + 10) == (0.0, 0.0)
    assert precision_recall(spread, spread) == (1.0, 1.0)
    two_modes = torch.cat([spread, spread + 10])
    assert precision_recall(spread, two_modes) == (1.0, 0.5)  # one mode is missing: precise, and half recalled
    assert precision_recall(two_modes, spread) == (0.5, 1.0)
    with pytest.raises(ValueError, match="more than 3 images on each side, got 3 against 60"):
        precision_recall(spread[:3], spread)


def test_inception_score_of_one_hot_and_of_undecided_predictions():
    one_hot = 60.0 * torch.eye(10).repeat(30, 1)
    assert inception_score(one_hot) == pytest.approx(10.0, rel=1e-6)
    assert inception_score(torch.zeros(50, 10)) == pytest.approx(1.0)
    assert inception_score(one_hot[:1].repeat(50, 1)) == pytest.approx(1.0)  # sure, but always of one class


def adms_inception_score(probabilities, split_size=5000):
    """The published formula over consecutive parts, in NumPy; the last part may be smaller."""
    scores = []
    for start in range(0, len(probabilities), split_size):
        part = probabilities[start : start + split_size]
        divergence = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(divergence.sum(axis=1).mean()))
    return float(np.mean(scores))


@pytest.mark.parametrize("count", [300, 5000, 7000, 10_000])
def test_inception_score_is_adms_mean_over_unshuffled_parts_of_5000(count):
    logits = 2 * torch.randn(count, 10, generator=torch.Generator().manual_seed(count))
    logits[: count // 2, :5] += 3.0  # so that the order matters
    expected = adms_inception_score(logits.double().softmax(dim=1).numpy())
    assert inception_score(logits) == pytest.approx(expected, rel=1e-9)
    if count > 5000:
        shuffled = logits[torch.randperm(count, generator=torch.Generator().manual_seed(1))]
        assert inception_score(shuffled) != pytest.approx(expected, rel=1e-3)


def test_a_stream_a_tensor_and_the_cache_give_the_same_metrics(extractor, reference, tmp_path):
    images = pictures(140)
    plain = run(images, reference, extractor, bootstrap=5).to_dict()
    streamed = evaluate(iter(images.split(33)), reference, extractor, cache=None, bootstrap=5).to_dict()
    cached = [evaluate(images, reference, extractor, cache=tmp_path, bootstrap=5).to_dict() for _ in range(2)]
    for other in (streamed, *cached):
        assert {**other, "minutes": 0} == {**plain, "minutes": 0}


def test_bootstrap_surrounds_the_distance_and_is_optional(extractor, reference):
    plain, interval = run(pictures(140), reference, extractor), run(pictures(140), reference, extractor, bootstrap=20)
    assert plain.fd_low is None and plain.fd_high is None
    assert interval.fd_low < interval.fd == plain.fd < interval.fd_high


def test_accuracy_counts_images_classified_as_asked(extractor, reference):
    images = pictures(140)
    labels = extractor(images).logits.argmax(1)
    assert run(images, reference, extractor, labels=labels).accuracy == 1.0
    labels[:35] = (labels[:35] + 1) % 10
    assert run(images, reference, extractor, labels=labels.tolist()).accuracy == pytest.approx(0.75)
    assert run(images, reference, extractor).accuracy is None


def test_precision_and_recall_can_be_left_out(extractor, reference):
    metrics = run(pictures(140), reference, extractor, precision_recall=False)
    assert metrics.precision is None and metrics.recall is None and metrics.fd > 0


def test_counts_that_disagree_are_refused_with_both_numbers(extractor, reference):
    with pytest.raises(ValueError, match="140 images, 139 labels"):
        run(pictures(140), reference, extractor, labels=[0] * 139)
    with pytest.raises(ValueError, match="140 images, 150 count"):
        run(iter(pictures(140).split(50)), reference, extractor, count=150)


def test_bad_images_labels_and_sizes_are_refused(extractor, reference):
    with pytest.raises(ValueError, match="128 images against 180 .* at least 129"):
        run(pictures(128), reference, extractor)
    with pytest.raises(ValueError, match="128 images against 180"):
        run(iter([pictures(128)]), reference, extractor)
    assert run(pictures(20), reference, extractor, allow_few=True).images == 20
    with pytest.raises(ValueError, match="140 images against 20"):
        run(pictures(140), make_reference(pictures(20), extractor), extractor)
    with pytest.raises(ValueError, match="float32; metrics need uint8"):
        run(pictures(140) / 255, reference, extractor)
    with pytest.raises(ValueError, match="28×28 px, those of reference 'noise' are 32×32"):
        run(pictures(140)[..., :28, :28], reference, extractor)
    with pytest.raises(ValueError, match="labels run from 0 to 10; .* classes 0 … 9"):
        run(pictures(140), reference, extractor, labels=[0] * 139 + [10])


def test_only_inception_is_called_fid(extractor, reference):
    metrics = run(pictures(140), reference, extractor)
    assert (metrics.fd_name, metrics.is_name, metrics.fd_title) == ("FD (fashion)", "IS (fashion)", "FD-140 (fashion)")
    row = metrics.to_row(method="k-means", bits=2)
    assert list(row)[:3] == ["method", "bits", "FD (fashion)"] and "FID" not in json.dumps(row)
    assert row["images"] == 140 and row["reference"] == "noise" and "sFID" not in row
    adm = Metrics.from_dict({**metrics.to_dict(), "extractor": "inception", "images": 10_000, "sfid": 6.14})
    assert (adm.fd_name, adm.fd_title, adm.is_name) == ("FID", "FID-10k", "IS") and adm.to_row()["sFID"] == 6.14


def test_metrics_survive_json(extractor, reference):
    metrics = run(pictures(140), reference, extractor, labels=[0] * 140, bootstrap=3)
    assert Metrics.from_dict(json.loads(json.dumps(metrics.to_dict()))) == metrics
    with pytest.raises(ValueError, match="fdd"):
        Metrics.from_dict({**metrics.to_dict(), "fdd": 1.0})


def test_memory_does_not_grow_with_the_images(extractor, reference):
    """Without Precision and Recall only the logits are held image by image."""
    from vqlib.evaluation.references import gather

    small, large = (gather(extractor.stream(pictures(50) for _ in range(n)), logits=True) for n in (4, 16))
    assert large.features is None and small.pool.scatter.shape == large.pool.scatter.shape == (128, 128)
    assert large.pool.count == 800 and large.logits.shape == (800, 10)
    np.testing.assert_allclose(large.pool.mean, small.pool.mean, rtol=1e-5)  # batch sizes differ: last bits


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.zeros(140, 1, dtype=torch.int64), r"labels have shape \[140, 1\], expected \[N\]"),
        (torch.eye(140, 10, dtype=torch.int64), r"labels have shape \[140, 10\]"),
        (torch.zeros(140), "labels are torch.float32, expected integers"),
        ([True] * 140, "labels are torch.bool, expected integers"),
        (["shirt"] * 140, "labels of type list are no class numbers"),
        ([True] + [2] * 139, "labels are torch.bool, expected integers"),
        (np.full(140, 2**63 + 1, np.uint64), "labels run from -"),
        ([-1] * 140, "labels run from -1 to -1"),
        ([0] * 139 + [-3], "labels run from -3 to 0; classes are numbered from 0"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused_before_an_image_is_read(extractor, reference, labels, message):
    def never():
        yield pytest.fail("read an image")

    with pytest.raises(ValueError, match=message):
        run(never(), reference, extractor, labels=labels)


def test_labels_may_be_numpys_of_any_width(extractor, reference):
    images = pictures(140)
    labels = extractor(images).logits.argmax(1).numpy()
    for width in ("uint8", "uint64", "int16"):
        assert run(images, reference, extractor, labels=labels.astype(width)).accuracy == 1.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bootstrap": 1}, "bootstrap=1 resamples"),
        ({"bootstrap": 2.5}, "bootstrap=2.5 is not an integer"),
        ({"bootstrap": 3, "seed": -1}, "seed=-1 is outside"),
    ],
)
def test_a_bootstrap_that_cannot_be_is_refused_before_an_image_is_read(extractor, reference, options, message):
    with pytest.raises(ValueError, match=message):
        run((pytest.fail("read an image") for _ in range(1)), reference, extractor, **options)
