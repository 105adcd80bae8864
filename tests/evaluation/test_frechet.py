"""Fréchet distance: known answers, parity with torch-fidelity, and what is refused."""

from vqlib.system import compat  # noqa: F401, isort: skip, first: torchvision beside a CPU torch

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from vqlib.evaluation.frechet import (
    FeatureStatistics,
    bootstrap_interval,
    frechet_distance,
    frechet_from_statistics,
    replicates,
)


def features(n, d=16, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99))
    return torch.randn(n, d, generator=generator) @ mix + shift


def test_gaussians_with_diagonal_covariance_have_the_closed_form():
    mu, var_1, var_2 = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 9.0])
    expected = float((mu**2).sum() + ((var_1.sqrt() - var_2.sqrt()) ** 2).sum())  # commuting covariances
    assert frechet_from_statistics(mu, var_1.diag(), 0 * mu, var_2.diag()) == pytest.approx(expected, rel=1e-12)


def test_gaussians_that_do_not_commute_have_the_closed_form_of_two_dimensions():
    a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[1.0, -0.5], [-0.5, 2.0]])
    root_trace = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))  # tr of a 2×2 square root
    expected = 25.0 + np.trace(a) + np.trace(b) - 2 * root_trace
    assert frechet_from_statistics([3.0, 4.0], a, [0.0, 0.0], b) == pytest.approx(expected, rel=1e-12)


def test_equal_sets_are_at_distance_zero_and_a_shift_is_its_square():
    x = features(200)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(x, x + 3.0) == pytest.approx(16 * 9.0, rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1.0, 1000.0])
def test_streamed_statistics_agree_with_torch_fidelity(shift):
    a, b = features(501, seed=1, shift=shift), features(400, seed=2, shift=shift) * 1.1
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(x.double()) for x in (a, b)), verbose=False)
    streams = [FeatureStatistics(), FeatureStatistics()]
    for stream, whole in zip(streams, (a, b)):
        for block in whole.split(37):
            stream.update(block)
    ours = frechet_from_statistics(streams[0].mean, streams[0].covariance, streams[1].mean, streams[1].covariance)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert frechet_distance(a, b) == pytest.approx(ours, rel=1e-9)


def test_statistics_are_numpys_and_do_not_depend_on_the_blocks():
    x = features(333, seed=3, shift=50.0)
    stream = FeatureStatistics()
    for block in (x[:1], x[1:300], x[300:300], x[300:]):
        stream.update(block)
    assert stream.count == 333 and stream.covariance.dtype == torch.float64
    np.testing.assert_allclose(stream.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(stream.mean, x.double().mean(0), rtol=1e-12)


def test_too_few_images_are_refused_with_both_counts():
    with pytest.raises(ValueError, match=r"16 images against 40 .* 16 feature dimensions: at least 17"):
        frechet_distance(features(16), features(40))
    with pytest.raises(ValueError, match="40 images against 5"):
        frechet_distance(features(40), features(5))
    assert frechet_distance(features(16), features(40), allow_few=True) > 0
    assert frechet_distance(features(17), features(17, seed=1)) > 0


def test_nan_and_unequal_dimensions_are_refused():
    bad = features(40)
    bad[7, 3] = float("nan")
    with pytest.raises(ValueError, match="image 7 contain NaN"):
        frechet_distance(bad, features(40))
    with pytest.raises(ValueError, match="16 and 8 dimensions"):
        frechet_distance(features(40), features(40, d=8))
    with pytest.raises(ValueError, match="sigma2 contains NaN"):
        frechet_from_statistics([0.0], [[1.0]], [0.0], [[float("nan")]])
    with pytest.raises(ValueError, match=r"sigma1 has shape \(2,\), expected \(2, 2\)"):
        frechet_from_statistics([0.0, 0.0], [1.0, 1.0], [0.0, 0.0], np.eye(2))


def test_bootstrap_interval_is_seeded_and_as_wide_as_new_samples_scatter():
    real = FeatureStatistics().update(features(4000, d=4, seed=99_000))
    draws = [features(400, d=4, seed=s, shift=2.0) for s in range(1, 41)]
    distances = [frechet_distance(x, features(4000, d=4, seed=99_000)) for x in draws]

    def interval(i, seed):
        return bootstrap_interval(draws[i], real.mean, real.covariance, distances[i], 60, seed)

    intervals = [interval(i, seed=i) for i in range(5)]
    assert all(low < distance < high for (low, high), distance in zip(intervals, distances))
    assert interval(0, seed=0) == intervals[0] != interval(0, seed=1)
    widths = [high - low for low, high in intervals]
    assert np.median(widths) / (2 * 1.96) == pytest.approx(np.std(distances), rel=0.35)
    with pytest.raises(ValueError, match="bootstrap=1 resamples"):
        bootstrap_interval(draws[0], real.mean, real.covariance, 1.0, 1)


def test_resampling_within_classes_is_as_wide_as_new_samples_of_the_same_classes_scatter():
    """Classes far apart: over all images the shares of the classes would move, which no other seed moves."""
    real = FeatureStatistics().update(features(4000, d=4, seed=99_000))
    labels = torch.arange(400) % 10
    between = 10.0 * features(10, d=4, seed=98_000)[labels]
    draws = [features(400, d=4, seed=s) + between for s in range(1, 41)]
    distances = [frechet_distance(x, features(4000, d=4, seed=99_000)) for x in draws]

    def width(i, labels):
        low, high = bootstrap_interval(draws[i], real.mean, real.covariance, distances[i], 60, labels=labels)
        return (high - low) / (2 * 1.96)

    scatter = np.std(distances)
    assert np.median([width(i, labels) for i in range(5)]) == pytest.approx(scatter, rel=0.35)
    assert np.median([width(i, None) for i in range(5)]) > 3 * scatter


def test_few_images_a_class_scatter_as_many_do():
    """n − 1 draws that weigh n / (n − 1): with two a class n draws would halve the variance. One a class: over all of them."""
    real = FeatureStatistics().update(features(4000, d=2, seed=99_000))
    x = features(200, d=2, seed=1, shift=2.0)

    def spread(labels):
        return replicates(x, real.mean, real.covariance, 200, labels=labels).std().item()

    plain = spread(None)
    assert spread(torch.arange(200) % 100) == pytest.approx(plain, rel=0.25)
    assert spread(torch.tensor([*range(199), 198])) == plain  # somewhere a single image
    assert spread(7 + 5 * (torch.arange(200) % 2)) == spread(
        torch.arange(200) % 2
    )  # what classes are called is nothing
