"""Fréchet distance between two sets of features: float64 statistics, gathered in a stream, and the distance itself.

FD = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) (Heusel et al. 2017, eq. 6). The distance is torch-fidelity's; its statistics
take the mean in float32 and need all features at once, so those are gathered here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class FeatureStatistics:
    """Running count, mean [D] and scatter [D, D] of features, float64 on the CPU; its size does not grow with N."""

    count: int = 0
    mean: Tensor | None = None
    scatter: Tensor | None = None

    def update(self, features: Tensor) -> FeatureStatistics:
        """Add features [B, D] (merged as Chan, Golub and LeVeque 1983). Raises ValueError on NaN or infinity."""
        if features.ndim != 2 or features.is_complex():
            raise ValueError(f"features are {features.dtype} {tuple(features.shape)}, expected real numbers [B, D]")
        x = features.detach().cpu().double()  # [B, D], widened to float64
        if not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).any(dim=1).nonzero()[0])
            raise ValueError(f"features of image {self.count + bad} contain NaN or infinity")
        if self.mean is not None and x.shape[1] != len(self.mean):
            raise ValueError(f"features have {x.shape[1]} dimensions, those before have {len(self.mean)}")
        if not len(x):
            return self
        mean = x.mean(dim=0)  # [B, D] -> [D]
        centered = x - mean
        scatter = centered.T @ centered  # [B, D] -> [D, D]
        if self.mean is None:
            self.count, self.mean, self.scatter = len(x), mean, scatter
            return self
        total, shift = self.count + len(x), mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * len(x) / total)
        self.mean = self.mean + shift * (len(x) / total)
        self.count = total
        return self

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance float64 [D, D], as `numpy.cov`."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(features_a: Tensor, features_b: Tensor, allow_few: bool = False) -> float:
    """Fréchet distance of features [N, D] and [M, D].

    Raises ValueError on NaN, on different D, and where N or M is below D + 1 (a singular covariance makes the distance
    depend mostly on the count) unless `allow_few`, which is for smoke tests.
    """
    sets = [FeatureStatistics().update(torch.as_tensor(features)) for features in (features_a, features_b)]
    dimensions = [torch.as_tensor(features).shape[1] for features in (features_a, features_b)]
    if dimensions[0] != dimensions[1]:
        raise ValueError(f"features have {dimensions[0]} and {dimensions[1]} dimensions")
    check_counts(sets[0].count, sets[1].count, dimensions[0], allow_few)
    return frechet_from_statistics(sets[0].mean, sets[0].covariance, sets[1].mean, sets[1].covariance)


def frechet_from_statistics(mu1, sigma1, mu2, sigma2) -> float:
    """Fréchet distance of two Gaussians: means [D], covariances [D, D], tensors or arrays, widened to float64."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    arrays = [np.asarray(value, dtype=np.float64) for value in (mu1, sigma1, mu2, sigma2)]
    d = len(arrays[0])
    for name, array, shape in zip(("mu1", "sigma1", "mu2", "sigma2"), arrays, ((d,), (d, d)) * 2):
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} contains NaN or infinity")
    first, second = ({"mu": mu, "sigma": sigma} for mu, sigma in (arrays[:2], arrays[2:]))
    distance = fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]
    return max(0.0, distance)  # rounding alone can make the distance of equal statistics −1e-12


def check_counts(images: int, reference_images: int | None, dimensions: int, allow_few: bool = False) -> None:
    """Refuse fewer than D + 1 images on either side: the covariance would be singular."""
    few = images <= dimensions or (reference_images is not None and reference_images <= dimensions)
    if few and not allow_few:
        known = "unknown" if reference_images is None else reference_images
        raise ValueError(
            f"{images} images against {known} of the reference are too few for {dimensions} feature dimensions: "
            f"at least {dimensions + 1} on each side (allow_few=True for a smoke test)"
        )


def bootstrap_interval(
    features: Tensor,
    mean: Tensor,
    covariance: Tensor,
    distance: float,
    resamples: int,
    seed: int = 0,
    labels: Tensor | None = None,
) -> tuple[float, float]:
    """95 % interval of the distance at this count: features [N, D] resampled as `replicates` does, the reference held fixed.

    It says how far the distance moves with other seeds, not how far it is from that of infinitely many images. Close to the
    reference, where the distance is flat, it is too wide rather than too narrow.
    """
    low, high = interval(distance, replicates(features, mean, covariance, resamples, seed, labels))
    return max(0.0, low), high


def replicates(
    features: Tensor, mean: Tensor, covariance: Tensor, resamples: int, seed: int = 0, labels: Tensor | None = None
) -> Tensor:
    """The distance of features [N, D] resampled with replacement, float64 [resamples].

    labels: int64 [N], the class that each image was asked for. Other seeds move no image to another class, so images are
    drawn within theirs; over all of them where some class has one image only. The draws depend on `seed`, N and labels
    alone, so those of two rows of the same images pair: their difference, one by one, is how the rows' difference moves.
    """
    if resamples < 2:
        raise ValueError(f"bootstrap={resamples} resamples: needs at least 2")
    x = features.cpu().double() - mean  # [N, D], widened to float64; shifted, so that the products below cancel little
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty(resamples, dtype=torch.float64)
    draws = _draws(torch.zeros(len(x), dtype=torch.long) if labels is None else labels, generator)
    for i, weight in zip(range(resamples), draws, strict=False):
        mu = weight @ x / len(x)  # [N] @ [N, D] -> [D]
        sigma = (x.T * weight) @ x - len(x) * torch.outer(mu, mu)  # [D, D]
        found[i] = frechet_from_statistics(mu, sigma / (len(x) - 1), torch.zeros_like(mu), covariance)
    return found


def _draws(labels: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """How much each image weighs in a resample, float64 [N], of N in all; without end.

    Of a class of n images n − 1 are drawn and weigh n / (n − 1), which scatters as n new images do for small n, too (Rao, Wu 1988).
    """
    _, labels, sizes = labels.unique(return_inverse=True, return_counts=True)  # [N], [classes]
    if int(sizes.min()) < 2:
        labels, sizes = torch.zeros_like(labels), torch.tensor([len(labels)])
    order, ends = labels.argsort(stable=True), sizes.cumsum(0)
    of_draws = torch.arange(len(sizes)).repeat_interleave(sizes - 1)  # the class of each draw
    first, size = (ends - sizes)[of_draws], sizes[of_draws]
    weight = sizes[labels] / (sizes[labels] - 1).double()
    while True:
        place = first + (torch.rand(len(size), dtype=torch.float64, generator=generator) * size).long()
        yield torch.bincount(order[place], minlength=len(labels)) * weight


def interval(value: float, found: Tensor) -> tuple[float, float]:
    """The 95 % interval of a value by its replicates [resamples].

    Resampling repeats images and so raises every distance alike: the replicates are centered on the value.
    """
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = (value + torch.quantile(found, tails) - found.mean()).tolist()
    return low, high
