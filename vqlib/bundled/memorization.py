"""How near generated pictures are to the nearest one trained on, against the same of real pictures the training never saw."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from vqlib.evaluation.extractors import Extractor

QUANTILE = 0.05  # of the test pictures' distances: what is nearer counts as near


@dataclass(frozen=True, eq=False)
class Nearest:
    """Of N pictures: the distance to the nearest training picture [N], and which one that is [N]."""

    distance: Tensor
    index: Tensor


def in_pixels(images: Tensor, train: Tensor) -> Nearest:
    """uint8 images [N, C, H, W] and [M, C, H, W]; the distance is the root mean square over pixels, 0 … 255."""
    found = _nearest(images.flatten(1).float(), train.flatten(1))
    return Nearest(found.distance / images[0].numel() ** 0.5, found.index)


def in_features(images: Tensor, train: Tensor, extractor: Extractor) -> Nearest:
    """The same in the extractor's features, the Euclidean distance."""
    return _nearest(extractor(images).features, extractor(train).features)


def table(found: dict[str, tuple[Nearest, Nearest]]) -> pd.DataFrame:
    """A row for generated and for test pictures (name, then the distances by space) with medians and the share that is near.

    found: {space: (of generated, of test)}. A share is of pictures nearer than the test pictures' 5 % quantile.
    """
    rows = []
    for space, (generated, test) in found.items():
        bound = test.distance.quantile(QUANTILE)
        for name, part in (("generated", generated), ("test", test)):
            row = {"distance in": space, "pictures": name, "median": part.distance.median().item()}
            row |= {"5 % quantile": part.distance.quantile(QUANTILE).item()}
            rows.append(row | {"nearer than the test's 5 % quantile": (part.distance < bound).float().mean().item()})
    return pd.DataFrame(rows)


def _nearest(points: Tensor, train: Tensor, batch: int = 4096) -> Nearest:
    """points float [N, D]; train [M, D], widened part by part."""
    best = torch.full((len(points),), torch.inf, device=points.device)
    index = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for first in range(0, len(train), batch):
        part = train[first : first + batch].float()
        distance, place = torch.cdist(points, part).min(dim=1)  # [N, b] -> [N]
        nearer = distance < best
        best = torch.where(nearer, distance, best)
        index = torch.where(nearer, place + first, index)
    return Nearest(best, index)
